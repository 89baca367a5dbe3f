"""ResNet-50 on SCNN against the paper's table 6, and the time that all designs take for it."""

import time

import numpy as np
import pytest
import torch
import torchvision

from swatfx.accelerators import ACCELERATORS, SCNN, BitTactical, cache_clear, get, total


def resnet50_layers() -> list[tuple[tuple[int, int, int, int], dict]]:
    """Weight shape and geometry of the 53 convolutions, in order."""
    layers = []

    def note(module: torch.nn.Conv2d, args: tuple[torch.Tensor]) -> None:
        size, stride = tuple(args[0].shape[2:]), module.stride[0]
        geometry = dict(input_hw=size, stride=stride, padding=module.padding[0])
        layers.append((tuple(module.weight.shape), geometry))

    with torch.device("meta"):
        model = torchvision.models.resnet50()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(note)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    return layers


def masks(density: float, activation_density: float = 0.5):
    """Random masks of all layers; the first is dense."""
    rng = np.random.default_rng(0)
    for index, (shape, geometry) in enumerate(resnet50_layers()):
        weights = rng.random(shape) < (density if index else 1)
        size = (shape[1], *geometry["input_hw"])
        yield weights, rng.random(size) < (activation_density if index else 1), geometry


# percent: forward over its own dense run; backward over full slots, over its own dense run
TABLE_6 = {80: (3.15, 3.4, 3.0), 90: (5.6, 6.4, 5.7)}
PAPER = {80: (3.3, 3.4), 90: (5.6, 6.3)}


@pytest.mark.slow
@pytest.mark.parametrize("percent", TABLE_6)
def test_table_6(percent: int) -> None:
    layers = list(masks(1 - percent / 100))
    assert len(layers) == 53
    forward = total(SCNN().conv_cycles(w, a, **g) for w, a, g in layers)
    # the first layer needs no input gradient
    backward = total(SCNN().backward_input(w, **g) for w, _, g in layers[1:])
    expected = TABLE_6[percent]
    assert forward.own_speedup == pytest.approx(expected[0], rel=0.01)
    assert backward.full_slot_speedup == pytest.approx(expected[1], rel=0.01)
    assert backward.own_speedup == pytest.approx(expected[2], rel=0.01)
    assert forward.own_speedup == pytest.approx(PAPER[percent][0], rel=0.05)
    assert backward.full_slot_speedup == pytest.approx(PAPER[percent][1], rel=0.05)
    assert forward.speedup == pytest.approx({80: 0.7, 90: 1.2}[percent], rel=0.05)


@pytest.mark.slow
def test_bit_tactical_cannot_reach_table_6() -> None:
    for percent, bound in ((80, 2), (90, 2.2)):
        layers = list(masks(1 - percent / 100))
        assert total(BitTactical().conv_cycles(w, a, **g) for w, a, g in layers).speedup < bound


@pytest.mark.slow
def test_all_passes_of_all_designs_in_a_minute() -> None:
    layers = list(masks(0.2))
    cache_clear()
    start = time.perf_counter()
    for name in ACCELERATORS:
        design = get(name)
        for weights, activations, geometry in layers:
            filters, _, *kernel = weights.shape
            design.conv_cycles(weights, activations, **geometry)
            design.backward_input(weights, **geometry)
            design.backward_weight(activations, filters=filters, kernel=kernel, **geometry)
    assert time.perf_counter() - start < 60
