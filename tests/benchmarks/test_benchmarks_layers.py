"""benchmarks.layers: its sides do a compiled graph's work, and its figures hold together."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from tabulate import tabulate
from torch import nn

import swatfx
from benchmarks import common, layers, rates
from benchmarks.bounds import BOUNDS, PRODUCTS
from benchmarks.layer_sides import PARTS, Data, Layer, SparseConv, dense_side, graph_layout
from swatfx import kernels
from swatfx.tensors import layouts
from tests.nets.runners import check_spread, run_quick

pytestmark = pytest.mark.usefixtures("spare_time")
_LAYER = Layer(3, 8, 12, 6, 4)
_EAGER = ("nchw", "channels_last")


def test_layers(capsys: pytest.CaptureFixture[str]) -> None:
    measured = run_quick(layers, capsys, "--sparsities", "0.8", "0.9", "--dtypes", "bf16", "fp32")
    names = ["3x3 16 at 8, batch 16", "1x1 16->32 at 8, batch 16"]
    assert [result["layer"] for result in measured["layers"]] == names
    rates = measured["rates"]
    for result in measured["layers"]:
        assert set(result["dense"]) == {f"dense {f} {d}" for f in _EAGER for d in ("fp32", "bf16")}
        assert result["unavailable"] == {}
        seconds = {name: values["median"] for name, values in result["dense"].items()}
        fastest = result["fastest_dense"]
        assert fastest["any"] == min(seconds, key=seconds.__getitem__)
        for dtype in ("fp32", "bf16"):
            own = {name: value for name, value in seconds.items() if name.endswith(dtype)}
            assert fastest[dtype] == min(own, key=own.__getitem__)
        assert set(result["sparse"]) == {"0.8", "0.9"}
        for by_dtype in result["sparse"].values():
            assert list(by_dtype) == ["bf16", "fp32"]
            for sparse in by_dtype.values():
                _check_side(sparse, rates)
    means = measured["geometric_means"]["0.8"]
    for dtype in ("fp32", "bf16"):
        for over in ("speedups", "same_dtype"):
            one, other = (r["sparse"]["0.8"][dtype][over]["kernels"] for r in measured["layers"])
            mean = means[dtype][over]["kernels"]["geometric_mean"]
            assert mean == pytest.approx((one["median"] * other["median"]) ** 0.5)
    assert means["fp32"]["same_dtype"]["kernels"]["wanted"] == 2.0
    assert means["fp32"]["same_dtype"]["period_1"]["wanted"] == 1.5
    assert "wanted" not in means["fp32"]["same_dtype"]["period_1000"]
    assert "wanted" not in means["fp32"]["speedups"]["kernels"]
    assert "wanted" not in means["bf16"]["same_dtype"]["kernels"]


def _check_side(sparse: dict[str, Any], rates: dict[str, float] | None) -> None:
    assert set(sparse["speedups"]) == set(sparse["same_dtype"]) == set(layers.SPARSE)
    for values in (*sparse["speedups"].values(), *sparse["same_dtype"].values()):
        check_spread(values)
        assert values["minimum"] > 0
    assert sparse["converted_from"] in _EAGER
    assert list(sparse["parts"]) == list(PARTS)
    assert sum(part["share"] for part in sparse["parts"].values()) == pytest.approx(1)
    assert ("bounds" in sparse) == (rates is not None)
    for product, bound in sparse.get("bounds", {}).items():
        largest = bound["seconds"][bound["largest"]]
        assert largest == max(bound["seconds"][kind] for kind in BOUNDS)
        median = sparse["parts"][product]["seconds"]["median"]
        assert bound["reached"] == pytest.approx(largest / median)


def test_one_dtype_is_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--layers", "11", "--batch", "16", "--sparsities", "0.9", "--dtypes", "bf16")
    measured = run_quick(layers, capsys, *words)
    (result,) = measured["layers"]
    assert set(result["dense"]) == {"dense nchw bf16", "dense channels_last bf16"}
    assert set(result["fastest_dense"]) == {"any", "bf16"}
    assert list(result["sparse"]["0.9"]) == ["bf16"]


def test_tables_fit_a_screen() -> None:
    spread = {"median": 9.988, "minimum": 0.00123, "maximum": 123.456}
    sides = dict.fromkeys(layers.SPARSE, spread)
    bound = {
        "seconds": {"load": 0.0123456, "multiply": 0.123456, "memory": 1.23e-6, "load_l2": 0.0567},
        "largest": "multiply",
        "reached": 0.98765,
    }
    found = {
        "speedups": sides,
        "same_dtype": sides,
        "parts": {part: {"seconds": {k: v / 1e3 for k, v in spread.items()}} for part in PARTS},
        "bounds": dict.fromkeys(PRODUCTS, bound),
    }
    dense = "dense compiled_channels_last bf16"
    result = {
        "layer": str(layers.LAYERS[5]),
        "fastest_dense": {"any": dense, "bf16": dense},
        "dense": {dense: {"median": 0.123456}},
        "unavailable": {},
        "sparse": {"0.95": {"bf16": found}},
    }
    mean = dict.fromkeys(layers.SPARSE, {"geometric_mean": 2.3456})
    measured = {
        "layers": [result],
        "geometric_means": {"0.95": {"bf16": {"speedups": mean, "same_dtype": mean}}},
        "rates": {"fma": 2.8e11, "dot": None, "l1": 1.1e12, "l2": 4e11, "memory": 7e10},
    }
    for table in (layers.table, *layers.BENCHMARK.further):
        headers, rows = table(measured)
        text = tabulate([[common.cell(v) for v in row] for row in rows], headers)
        assert max(map(len, text.splitlines())) <= 120, text
    assert "multiply 99%" in [row[7] for row in layers.bounds_table(measured)[1]]


def test_without_a_compiler_bounds_are_empty_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(rates.shutil, "which", lambda name: None)
    assert common.run(layers.BENCHMARK, ["--quick", "--repeats", "1", "--sparsities", "0.9"]) == 0
    said = capsys.readouterr()
    assert said.err == "no bounds: there is no C compiler\n"
    assert said.out.count("there is no C compiler") == 1  # in the last table
    assert "memory 1" not in said.out and "%" not in said.out


def test_the_eleven_layers_are_those_that_others_measured() -> None:
    assert [str(layer) for layer in layers.LAYERS] == [
        "1x1 64->256 at 56, batch 32",
        "3x3 64 at 56, batch 32",
        "3x3 128 at 28, batch 32",
        "1x1 512->128 at 28, batch 32",
        "3x3 256 at 14, batch 32",
        "1x1 1024->256 at 14, batch 32",
        "3x3 512 at 7, batch 32",
        "1x1 512->2048 at 7, batch 32",
        "3x3 64 at 32, batch 64",
        "3x3 256 at 8, batch 128",
        "3x3 512 at 4, batch 128",
    ]


@pytest.mark.parametrize("word", ["0", "12", "x"])
def test_a_layer_that_is_not_there_is_refused(word: str) -> None:
    with pytest.raises(SystemExit):
        common.run(layers.BENCHMARK, ["--layers", word])


@pytest.mark.parametrize("word", ["0", "1", "-0.5"])
def test_a_sparsity_out_of_range_is_refused(word: str) -> None:
    with pytest.raises(SystemExit):
        common.run(layers.BENCHMARK, ["--sparsities", word])


def _assert_close(a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    assert a is not None and b is not None
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [layouts.ROW_MAJOR, "graph"])
def test_the_sparse_side_does_what_a_compiled_graph_does(layout: str) -> None:
    layout = graph_layout() if layout == "graph" else layout
    data = Data(_LAYER)
    conv = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    conv.weight.data.copy_(data.weight)
    gm = swatfx.compile(nn.Sequential(conv), "swat-u:0.8,first_dense=False")
    x, grad = data.of(layouts.ROW_MAJOR)
    expected = gm(x)
    expected.backward(grad)
    wanted, x.grad = x.grad, None
    ours = SparseConv(data, 0.8, 1, layout)
    inside, inside_grad = data.of(layout)
    found = ours(inside)
    found.backward(inside_grad)
    _assert_close(found, expected)
    _assert_close(inside.grad, wanted)
    _assert_close(ours.weight.grad, conv.weight.grad)


def test_every_sparse_side_leaves_the_gradients_of_one_step() -> None:
    data = Data(_LAYER)
    x, _ = data.of(layouts.ROW_MAJOR)
    outer, inner = layouts.CHANNELS_LAST, layouts.ROW_MAJOR

    def gradients(side: str) -> tuple[Any, Any]:
        module = SparseConv(data, 0.8, 1, inner)
        read = data.of(outer)[0] if side == "converted" else x
        sides = {
            "kernels": module.kernels_side,
            "step": lambda: module.step_side(inner),
            "converted": lambda: module.step_side(outer),
        }
        sides[side]()()
        return read.grad, module.weight.grad

    wanted = gradients("step")
    for side in ("kernels", "converted"):
        for found, expected in zip(gradients(side), wanted, strict=True):
            _assert_close(found, expected)


def test_parts_are_all_measured_and_the_weight_changes_each_time() -> None:
    data = Data(_LAYER)
    module = SparseConv(data, 0.8, 1, layouts.ROW_MAJOR)
    before = module.weight.detach().clone()
    parts = module.parts_side()()
    assert list(parts) == list(PARTS) and all(seconds > 0 for seconds in parts.values())
    assert not torch.equal(before, module.weight)


def test_thresholds_of_period_1000_are_kept() -> None:
    module = SparseConv(Data(_LAYER), 0.8, 1000, layouts.ROW_MAJOR)
    run = module.step_side(layouts.ROW_MAJOR)
    for _ in range(3):
        run()
    assert int(module.weight_threshold.stamp) == int(module.activation_threshold.stamp) == 0
    assert int(module.clock.iteration) == 3


def test_the_dense_side_is_a_convolution_with_both_gradients() -> None:
    data = Data(_LAYER)
    for layout in (layouts.ROW_MAJOR, layouts.CHANNELS_LAST):
        x, grad = data.of(layout)
        assert dense_side(data, layout, compiled=False)()["seconds"] > 0
        plain = torch.nn.grad.conv2d_input(x.shape, data.weight, grad, padding=1)
        torch.testing.assert_close(x.grad, plain, rtol=1e-3, atol=1e-4)
        assert layouts.layout_of(x) == layout


@pytest.mark.usefixtures("no_compiler")
def test_a_compiler_that_fails_is_named() -> None:
    args = argparse.Namespace(sparsities=[0.8], dtypes=["fp32"], compiled=True)
    result = layers.measure_layer(_LAYER, args, 1, None, lambda: None)
    why = "RuntimeError: no C++ compiler"
    assert result["unavailable"] == {f"dense compiled_{form} fp32": why for form in _EAGER}
    assert set(result["dense"]) == {f"dense {form} fp32" for form in _EAGER}
    assert "bounds" not in result["sparse"]["0.8"]["fp32"]


def test_bf16_sides_agree_with_float64() -> None:
    """Activations and gradients are bfloat16, and so is what is multiplied; sums are not."""
    data = Data(_LAYER)
    x, grad = data.of(layouts.ROW_MAJOR, "bf16")
    assert x.dtype is grad.dtype is torch.bfloat16
    weight = (data.weight * (1 + 2**-20)).bfloat16().double()
    wanted = torch.nn.grad.conv2d_input(x.shape, weight, grad.double(), padding=1)
    for layout in (layouts.ROW_MAJOR, layouts.CHANNELS_LAST):
        dense_side(data, layout, compiled=False, dtype="bf16")()
        found = data.of(layout, "bf16")[0].grad
        assert found is not None and found.dtype is torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2**-8)
    ours = SparseConv(data, 0.8, 1, layouts.ROW_MAJOR, "bf16")
    ours.step_side(layouts.ROW_MAJOR)()
    kept = data.weight.abs() >= data.weight.abs().flatten().kthvalue(692).values  # of 864, 80% go
    wanted = torch.nn.grad.conv2d_input(x.shape, weight * kept, grad.double(), padding=1)
    assert x.grad is not None and x.grad.dtype is torch.bfloat16
    torch.testing.assert_close(x.grad.double(), wanted, rtol=2**-8, atol=2**-8)
    assert ours.weight.grad is not None and ours.weight.grad.dtype is torch.float32


@pytest.mark.slow
def test_torch_compile_compiles_forward_and_backward() -> None:
    torch._dynamo.reset()
    data = Data(_LAYER)
    run = dense_side(data, layouts.CHANNELS_LAST, compiled=True)
    run()
    x, grad = data.of(layouts.CHANNELS_LAST)
    plain = torch.nn.grad.conv2d_input(x.shape, data.weight, grad, padding=1)
    torch.testing.assert_close(x.grad, plain, rtol=1e-3, atol=1e-4)
