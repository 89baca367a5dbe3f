"""The choice of kernels by what they are predicted to take, at example inputs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import forecast, kernels
from swatfx.compiled import SwatModule
from swatfx.forecast.constants import DTYPES, key, sides_of
from swatfx.forecast.work import CONVERSION, DENSE, KINDS, LINEAR, NORM, PLAIN, SPARSE, Work
from tests.nets.kernel_nets import chain, chosen, conversions, residual

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
IMAGES = (torch.empty(4, 3, 8, 8, device="meta"),)
DEARER = "dense: sparse kernels would take"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def believe(**seconds: dict[str, float]) -> None:
    """Store constants: so many seconds a call on a side, 1 where nothing is said."""
    here = forecast.this_machine()
    table = {}
    for dtype in DTYPES:
        for kind in KINDS:
            for side in sides_of(kind):
                own = seconds.get(f"{dtype}_{kind}", seconds.get(kind, {}))
                rest = [0.0] * (len(Work(kind, dtype).quantities(side)) - 1)
                table[key(dtype, kind, side)] = (own.get(side, 1.0), *rest)
    forecast.write(
        forecast.Constants(table, here.threads, here.kernels, here.processor, "2026-01-01", 0, 0)
    )


DEAR, CHEAP = {SPARSE: 3.0}, {SPARSE: 0.1}
CONVOLUTIONS = ("pointwise", "spatial", "strided")


def compiled(policy: str = "swat-u:0.9", **options: object) -> SwatModule:
    return swatfx.compile(chain(), policy, example_inputs=IMAGES, **options)  # type: ignore[arg-type]


def test_cheap_sparse_kernels_run_at_any_density() -> None:
    believe(**dict.fromkeys(CONVOLUTIONS, CHEAP))
    gm = compiled("swat-u:0.5")
    assert [why for name, why in chosen(gm).items() if name != "8"] == ["sparse"] * 3
    assert "0." in gm.swat.predicted and gm.swat.predicted in gm.pass_records[-1].notes
    without = swatfx.compile(chain(), "swat-u:0.5")
    assert "sparse" not in chosen(without).values()  # the rule, which knows no shapes
    assert without.swat.predicted == ""


def test_where_nothing_wins_all_stay_dense_and_it_is_told_by_how_much() -> None:
    believe(**dict.fromkeys(CONVOLUTIONS, DEAR))
    gm = compiled()
    found = [why for name, why in chosen(gm).items() if name != "8"]
    assert all(why.startswith(DEARER) for why in found) and conversions(gm) == []
    assert "would take" in gm.swat.predicted
    report = swatfx.report(gm, IMAGES)
    assert report.predicted == gm.swat.predicted in report.to_text()
    assert {row.kernels for row in report.layers} >= set(found)
    assert any("longer at this input (3 of them)" in note for note in gm.pass_records[-1].notes)


def test_conversions_are_counted() -> None:
    """Each layer alone gains, but its conversions, there and back, take more."""
    sides = dict.fromkeys(CONVOLUTIONS, {SPARSE: 0.9})
    believe(**sides, conversion={SPARSE: 1e-9}, norm={SPARSE: 1.0})
    assert "sparse" in chosen(compiled()).values()
    believe(**sides, conversion={SPARSE: 5.0}, norm={SPARSE: 1.0})
    found = chosen(compiled())
    assert "sparse" not in found.values()
    times = float(found["4"].removeprefix(DEARER).split()[0])
    assert times > 5  # the ratio has them in it


def test_options_force_the_choice() -> None:
    believe(**dict.fromkeys(CONVOLUTIONS, DEAR))
    assert "sparse" in chosen(compiled(kernels="sparse")).values()
    believe(**dict.fromkeys(CONVOLUTIONS, CHEAP))
    assert set(chosen(compiled(kernels="dense")).values()) == {"dense: asked for"}


def test_the_dtype_selects_the_constants() -> None:
    believe(**{f"bf16_{kind}": DEAR for kind in CONVOLUTIONS}, **dict.fromkeys(CONVOLUTIONS, CHEAP))
    gm = compiled()
    assert "sparse" in chosen(gm).values() and "fp32" in gm.swat.predicted
    with torch.autocast("cpu", torch.bfloat16):
        half = compiled()
    assert "sparse" not in chosen(half).values() and "bf16" in half.swat.predicted
    twin = copy.deepcopy(gm).bfloat16()  # is chosen for anew, at the same shapes
    assert "sparse" not in chosen(twin).values() and "bf16" in twin.swat.predicted
    assert "sparse" in chosen(gm).values()
    assert chosen(twin.float()) == chosen(gm)


def test_layers_that_share_an_input_run_alike() -> None:
    believe(strided=DEAR, spatial=CHEAP, pointwise={SPARSE: 1.05})
    gm = swatfx.compile(residual(), "swat-u:0.9", example_inputs=IMAGES)
    packs: dict[int, set[bool]] = {}
    for layer in swatfx.compiled.sparse_nodes(gm):
        if layer.pack_module is not None and layer.is_conv:
            pack = packs.setdefault(id(layer.pack_module), set())
            pack.add(layer.plan.kernels == SPARSE)
    assert all(len(kinds) == 1 for kinds in packs.values()) and packs


def test_linear_layers_alone() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 32))
    x = (torch.empty(64, 32, device="meta"),)
    for side, sparse in ((CHEAP, True), (DEAR, False)):
        believe(**{LINEAR: side})
        gm = swatfx.compile(copy.deepcopy(net), "swat-u:0.6", example_inputs=x)
        assert all((why == SPARSE) == sparse for why in chosen(gm).values())


class _ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y[y.mean((1, 2, 3)) > 0])  # type: ignore[no-any-return]


def test_shapes_that_depend_on_values_leave_the_rule() -> None:
    gm = swatfx.compile(_ByValue(), "swat-u:0.9", example_inputs=(torch.randn(4, 3, 16, 16),))
    assert chosen(gm) == chosen(swatfx.compile(_ByValue(), "swat-u:0.9"))
    assert gm.swat.predicted.startswith("kernels are chosen by densities alone")


def test_predictions_add_up_by_hand() -> None:
    """One norm between two convolutions: 2 layers and it, sparse; conversions in and out."""
    believe(
        spatial={SPARSE: 0.5, DENSE: 2.0, PLAIN: 1.0},
        pointwise={SPARSE: 0.5, DENSE: 2.0, PLAIN: 1.0},
        **{NORM: {SPARSE: 0.25, DENSE: 1.0, PLAIN: 0.5}, CONVERSION: {SPARSE: 0.125}},
    )
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
    policy = "swat-u:0.9,first_dense=false"
    x = (torch.empty(4, 16, 8, 8, device="meta"),)
    gm = swatfx.compile(net, policy, example_inputs=x)
    assert set(chosen(gm).values()) == {SPARSE}
    ours, dense, plain = 2 * 0.5 + 0.25 + 2 * 0.125, 2 * 2.0 + 1.0, 2 * 1.0 + 0.5
    assert f"{ours / dense:.2f} of the time under dense kernels" in gm.swat.predicted
    assert f"{ours / plain:.2f} times the time of the model" in gm.swat.predicted


class Twice(nn.Module):
    """A layer that an optional argument lets run once more, in another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h: Tensor = self.b(self.a(x).relu())
        if y is not None:
            h = h + self.b(self.a(y).relu())
        z: Tensor = self.fc(h.mean((2, 3)))
        return z


@pytest.mark.parametrize("seconds", [DEAR, CHEAP], ids=["dear", "cheap"])
def test_all_calls_of_a_layer_run_alike(seconds: dict[str, float]) -> None:
    """Also in a graph that the example does not take."""
    seconds = {**seconds, DENSE: 2.0 if seconds is DEAR else 50.0}
    believe(**dict.fromkeys((*CONVOLUTIONS, "linear"), seconds))
    gm = swatfx.compile(Twice(), "swat-u:0.8", example_inputs=IMAGES)
    kinds: dict[str, set[bool]] = {}
    for layer in swatfx.compiled.sparse_nodes(gm):
        kinds.setdefault(layer.plan.name, set()).add(layer.plan.kernels == "sparse")
    assert set(kinds) == {"b", "fc"}
    assert all(found == {seconds[DENSE] > 2} for found in kinds.values())
