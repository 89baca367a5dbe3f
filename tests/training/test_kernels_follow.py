"""Kernels are chosen again as densities move: when, how often, and what stays as it was."""

from __future__ import annotations

import copy
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from passes.choose_kernels import MOST_DENSE, STAYS_SPARSE, follow_densities
from swatfx import kernels
from swatfx.compiled.layers import sparse_layers
from swatfx.compiled.module import SwatModule
from swatfx.density import Density
from tests.nets.kernel_nets import chosen, forbid_references
from tests.nets.masked_twin import assert_masked_gradients, network, step
from tests.nets.small_nets import assert_same

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
RAMP = "gradual-magnitude:0.9,update_every=2,update_until=1.0"
CROSSES = 6  # the step of twelve after which its densities are below the rule's
SPARSE = "sparse"


def attached(policy: str = RAMP, **options: Any) -> tuple[SwatModule, torch.optim.SGD]:
    gm = swatfx.compile(network(), policy, **options)
    return gm, attach(gm)


def attach(gm: SwatModule) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
    swatfx.attach(gm, optimizer, steps_per_epoch=12, total_steps=12)
    return optimizer


def images(number: int) -> Tensor:
    return torch.randn(32, 3, 9, 10, generator=torch.Generator().manual_seed(number))


def train(
    gm: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, half: bool = False
) -> None:
    for number in range(first, last + 1):
        step(gm, images(number), half)
        optimizer.step()


def runs_sparse(gm: SwatModule) -> bool:
    found = set(chosen(gm).values())
    assert (SPARSE in found) == ("batch_innermost" in gm.code)
    return SPARSE in found


def code_of(gm: SwatModule) -> str:
    """Conversions are numbered on and on."""
    return re.sub(r"laid_out(_\d+)?", "laid_out", gm.code)


def set_densities(gm: SwatModule, value: float) -> None:
    for layer in sparse_layers(gm):
        layer.set_density(Density(value))


@pytest.mark.parametrize("half", [False, True])
def test_gradients_across_the_threshold(half: bool) -> None:
    """Those of the masked network before and after, and no reference kernel runs after."""
    gm, optimizer = attached()
    for number in range(1, 13):
        assert runs_sparse(gm) == (number > CROSSES), number
        step(gm, images(number), half)
        assert_masked_gradients(gm, images(number), half)
        optimizer.step()


def test_references_rest_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, optimizer = attached()
    train(gm, optimizer, 1, CROSSES)
    forbid_references(monkeypatch)
    train(gm, optimizer, CROSSES + 1, CROSSES + 3)


def test_the_report_follows() -> None:
    gm, optimizer = attached()
    x = images(0)
    before = [layer.kernels for layer in swatfx.report(gm, x).layers]
    assert f"dense: weight density is above {MOST_DENSE} now" in before and SPARSE not in before
    train(gm, optimizer, 1, CROSSES)
    after = [layer.kernels for layer in swatfx.report(gm, x).layers]
    assert SPARSE in after and len(after) == len(before)
    assert [layer.kernels for layer in swatfx.report(gm, x, device="cpu").layers] == after


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_what_is_asked_for_stays(kind: str) -> None:
    gm, optimizer = attached(kernels=kind)
    before, code = chosen(gm), gm.code
    assert runs_sparse(gm) == (kind == "sparse")
    train(gm, optimizer, 1, CROSSES + 1)
    assert chosen(gm) == before and gm.code == code


@pytest.mark.parametrize("policy", ["dsr:0.8", "swat-m:0.8"])
def test_densities_that_waver_move_nothing(policy: str) -> None:
    gm, _ = attached(policy)
    codes = {True: code_of(gm)}
    margin = (MOST_DENSE + STAYS_SPARSE) / 2
    for value, sparse in (
        *((margin, True), (0.29, True), (STAYS_SPARSE, True), (0.37, False), (margin, False)),
        *((0.31, False), (MOST_DENSE, True), (margin, True)),
    ):
        set_densities(gm, value)
        follow_densities(gm)
        assert runs_sparse(gm) == sparse, value
        assert codes.setdefault(sparse, code_of(gm)) == code_of(gm)


def test_one_layer_among_many() -> None:
    """It alone is chosen anew; where few are left, conversions would eat their gain."""
    gm, _ = attached("dsr:0.9")
    convolutions = [x for x in sparse_layers(gm) if x.node.is_conv]
    assert len(convolutions) == 3
    convolutions[1].set_density(Density(0.5))
    follow_densities(gm)
    found = chosen(gm)
    assert found["3"] == f"dense: weight density is above {MOST_DENSE} now"
    assert found["0"] == found["6"] == SPARSE
    convolutions[2].set_density(Density(0.5))
    follow_densities(gm)
    assert chosen(gm)["0"] == "dense: most convolutions run dense"


def states(gm: SwatModule, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = optimizer.state_dict()["state"]
    return dict(gm.state_dict()) | {str(i): s["momentum_buffer"] for i, s in moments.items()}


@pytest.mark.parametrize("cut", [CROSSES - 1, CROSSES, CROSSES + 1])
def test_checkpoints_go_on_bit_for_bit(cut: int, tmp_path: pathlib.Path) -> None:
    gm, optimizer = attached()
    train(gm, optimizer, 1, cut)
    swatfx.save(gm, tmp_path / "a.ckpt", optimizer=optimizer)
    model = network()
    other = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    twin = swatfx.load(tmp_path / "a.ckpt", model, optimizer=other)
    assert runs_sparse(twin) == runs_sparse(gm) == (cut >= CROSSES)
    swatfx.attach(twin, other, steps_per_epoch=12, total_steps=12)
    for one, its in ((gm, optimizer), (twin, other)):
        train(one, its, cut + 1, 12)
    assert_same(states(gm, optimizer), states(twin, other))
    assert chosen(gm) == chosen(twin)


@pytest.mark.parametrize("policy", ["dsr:0.8", "swat-m:0.8"])
@pytest.mark.parametrize("sparse", [False, True])
def test_state_dicts_bring_the_choice_within_the_margin(policy: str, sparse: bool) -> None:
    """Where it depends on what ran before, and so on no density."""
    gm, _ = attached(policy)
    for value in (0.2 if sparse else 0.5, 0.33):
        set_densities(gm, value)
        follow_densities(gm)
    assert runs_sparse(gm) == sparse
    twin = swatfx.compile(network(), policy)
    assert runs_sparse(twin)
    twin.load_state_dict(gm.state_dict())
    assert runs_sparse(twin) == sparse and chosen(twin) == chosen(gm)


def test_a_state_of_before_has_no_choice() -> None:
    gm, optimizer = attached()
    train(gm, optimizer, 1, CROSSES)
    state = {k: v for k, v in gm.state_dict().items() if not k.endswith(".sparse")}
    assert len(state) < len(gm.state_dict())
    twin = swatfx.compile(network(), RAMP)
    twin.load_state_dict(state)
    assert chosen(twin) == chosen(gm)
    assert_same(dict(twin.state_dict()), dict(gm.state_dict()))


def test_weights_alone_begin_anew() -> None:
    gm, optimizer = attached()
    train(gm, optimizer, 1, CROSSES)
    twin = swatfx.compile(network(), RAMP)
    twin.load_state_dict(swatfx.dense_state_dict(gm))
    assert not runs_sparse(twin)


@pytest.mark.parametrize("cut", [CROSSES - 1, CROSSES])
def test_copies_go_on_alike(cut: int) -> None:
    gm, optimizer = attached()
    train(gm, optimizer, 1, cut)
    twin = copy.deepcopy(gm)
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swatfx.attach(twin, other, steps_per_epoch=12, total_steps=12)
    train(gm, optimizer, cut + 1, 8)
    assert chosen(twin) == chosen(swatfx.compile(network(), RAMP)) or cut == CROSSES
    train(twin, other, cut + 1, 8)
    assert runs_sparse(twin) and chosen(twin) == chosen(gm)
    assert_same(states(gm, optimizer), states(twin, other))


def wrapped(gm: SwatModule) -> nn.Module:
    return nn.Sequential(gm)


def compiled(gm: SwatModule) -> nn.Module:
    compiled: nn.Module = torch.compile(gm, backend="eager")
    return compiled


def compiled_around(gm: SwatModule) -> nn.Module:
    return compiled(nn.Sequential(gm))  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "wrap", [wrapped, compiled, pytest.param(compiled_around, marks=pytest.mark.slow)]
)
def test_wrappers_run_what_is_chosen(wrap: Callable[[SwatModule], nn.Module]) -> None:
    """To the bit; torch.compile looks at the graph anew, once."""
    ends = []
    for way in (lambda gm: gm, wrap):
        gm, optimizer = attached()
        train(way(gm), optimizer, 1, 9)
        assert runs_sparse(gm)
        ends.append(states(gm, optimizer))
    assert_same(*ends)
    if wrap is not wrapped:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_hooks_stay() -> None:
    gm, optimizer = attached()
    seen: list[str] = []
    gm.register_forward_hook(lambda *_: seen.append("root"))
    gm.get_submodule("1").register_forward_hook(lambda *_: seen.append("norm"))
    train(gm, optimizer, 1, CROSSES)
    count = len(seen)
    train(gm, optimizer, CROSSES + 1, CROSSES + 2)
    assert runs_sparse(gm) and len(seen) - count == 2 * count // CROSSES


def test_a_pending_backward_is_that_of_its_forward() -> None:
    """Its graph was made before kernels were chosen again."""
    gm, optimizer = attached()
    train(gm, optimizer, 1, CROSSES - 1)
    assert not runs_sparse(gm)
    loss = gm(images(7)).square().mean()
    set_densities(gm, 0.1)
    follow_densities(gm)
    assert runs_sparse(gm)
    gm.zero_grad()
    loss.backward()
    assert_masked_gradients(gm, images(7), False)


def test_an_optimizer_inside_of_backward_changes_no_kernels() -> None:
    gm = swatfx.compile(network(), RAMP)
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in gm.parameters()}
    swatfx.attach(gm, list(optimizers.values()), total_steps=12)

    def move(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        parameter.grad = None

    for parameter in gm.parameters():
        parameter.register_post_accumulate_grad_hook(move)
    for number in range(1, 13):
        gm(images(number)).square().mean().backward()
    assert max(layer.weight_density.value for layer in sparse_layers(gm)) < 0.2
    assert not runs_sparse(gm)
