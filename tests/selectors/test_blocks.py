"""Blocks of neighbouring filters and input channels: against loops over blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import swatfx
from swatfx import kernels, selectors
from swatfx.compiled import SwatModule
from swatfx.density import DENSE, Density
from swatfx.errors import PolicyError
from swatfx.ops.where import kept_top
from swatfx.selectors import Axes, BlockSelector

WEIGHT = Axes(0, 1)
SHAPES = [
    (8, 8, 3, 3),
    (10, 7, 3, 3),
    (33, 18),
    (5, 9, 4),
    (8, 1, 3, 3),
    (1, 1, 1, 1),
    (3, 5, 2, 1, 2),
]
NAMES = ["block-4x1", "block-1x4", "block-1x2", "block-4x4", "block-3x5", "block-64x64"]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def blocks_of(w: Tensor, name: str) -> list[tuple[slice | int, ...]]:
    """Where each block lies."""
    high, wide = (int(size) for size in name.removeprefix("block-").split("x"))
    return [
        (slice(f, f + high), slice(c, c + wide), *place)
        for f in range(0, w.shape[0], high)
        for c in range(0, w.shape[1], wide)
        for place in itertools.product(*map(range, w.shape[2:]))
    ]


def mask_of(name: str, w: Tensor, density: Density) -> Tensor:
    selector = selectors.get(name)
    return selector.keep(w, selector.state(w, density, WEIGHT, 0), WEIGHT).expand_as(w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_ranked_by_their_mean_square(name: str, shape: tuple[int, ...]) -> None:
    w, density = draw(*shape), Density.from_sparsity(0.7)
    found = blocks_of(w, name)
    found.sort(key=lambda at: -float(w[at].double().square().mean()))
    expected = torch.zeros(shape, dtype=torch.bool)
    for at in found:
        if int(expected.sum()) >= density.count(w.numel()):
            break
        expected[at] = True
    assert torch.equal(mask_of(name, w, density), expected)
    assert torch.equal(mask_of(f"held:{name}", w, density), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_orders(dtype: torch.dtype) -> None:
    w, density = draw(10, 7, 3, 3).to(dtype), Density.from_sparsity(0.8)
    kept = mask_of("block-4x2", w, density)
    last = w.to(memory_format=torch.channels_last)
    assert torch.equal(mask_of("block-4x2", last, density), kept)
    for at in blocks_of(w, "block-4x2"):
        assert kept[at].all() or not kept[at].any()
    assert int(kept.sum()) >= density.count(w.numel())


def test_ties_stay_but_where_a_mask_is_held() -> None:
    w, density = torch.ones(8, 8), Density.from_sparsity(0.75)
    assert mask_of("block-4x1", w, density).all()
    held = mask_of("held:block-4x1", w, density)
    assert held[:4, :4].all() and int(held.sum()) == 16


def test_nothing_nan_and_everything() -> None:
    assert mask_of("block-4x1", torch.empty(0, 8, 3, 3), Density.from_sparsity(0.5)).numel() == 0
    for name in ("block-4x1", "held:block-4x1"):
        assert mask_of(name, draw(6, 5), DENSE).all()
    w = draw(8, 8)
    w[5, 3] = math.nan
    state = torch.tensor(9.0)
    kept = selectors.get("block-4x1").keep(w, state, WEIGHT)
    assert kept[4:, 3].all() and int(kept.sum()) == 4


@pytest.mark.parametrize(
    "name", ["block-", "block-4", "block-0x4", "block-1x1", "block-65x1", "block-4X1"]
)
def test_sizes_that_are_none(name: str) -> None:
    with pytest.raises(PolicyError, match="block-4x1 or block-1x2"):
        selectors.get(name)


def test_activations_have_no_blocks() -> None:
    policy = swatfx.swat_u(0.5, activation_selector="block-4x1", first_dense=False)
    with pytest.raises(PolicyError, match="block-4x1"):
        swatfx.compile(torch.nn.Sequential(torch.nn.Linear(8, 8)), policy)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_keeps_the_same_bits(name: str) -> None:
    if not kernels.available():
        pytest.skip("no compiled kernels")
    selector = selectors.get(name)
    assert isinstance(selector, BlockSelector)
    for shape in [*SHAPES, (7, 70), (5, 66, 1, 1), (4, 3, 9, 9)]:
        x = draw(*shape) * 1e-25
        x.view(-1)[::7] = 0
        orders = [x, x * 1e30 * 1e15]  # whose squares are no floats
        orders += [x.to(memory_format=torch.channels_last)] if x.dim() == 4 else []
        for w in orders:
            middle = selector.state(w, Density.from_sparsity(0.6), WEIGHT, 0)
            for state in (middle, torch.zeros(()), torch.tensor(math.inf)):
                with kernels.reference_only():
                    expected = kept_top(w, state, name, WEIGHT)
                found = kept_top(w, state, name, WEIGHT)
                assert torch.equal(found, expected) and found.stride() == expected.stride()
    w = torch.tensor([[math.nan, 1.0], [math.inf, 2.0], [0.0, 3.0]])
    found = kept_top(w, torch.tensor(math.inf), "block-1x2", WEIGHT)
    assert torch.equal(found.nan_to_num(7.0, 8.0), torch.tensor([[7.0, 1], [8, 2], [0, 0]]))


@pytest.mark.parametrize("policy", ["swat-u:0.9", "static:0.9", "swat-active-update:0.9"])
def test_a_network_trains_and_is_loaded(policy: str) -> None:
    torch.manual_seed(0)

    def compiled() -> SwatModule:
        layers = [torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 30, 3)]
        model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(480, 10))
        return swatfx.compile(model, f"{policy},weight_selector=block-4x1")

    gm, x = compiled(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    swatfx.attach(gm, optimizer, steps_per_epoch=1)
    for _ in range(3):
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()
    record = next(r for r in swatfx.report(gm, (x,)).layers if r.name == "2")
    assert record.realised_weight_density is not None
    # 30 filters are eight blocks of four: whole ones, up to three weights more than asked.
    above = (record.realised_weight_density - record.weight_density) * 30 * 32 * 9
    assert -1e-3 <= above < 4
    other = compiled()
    other.load_state_dict(gm.state_dict())
    assert torch.equal(gm.eval()(x), other.eval()(x))
