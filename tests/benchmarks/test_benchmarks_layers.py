"""benchmarks.layers: its sides do a compiled graph's work, and its figures hold together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import swatfx
from benchmarks import common, layers
from benchmarks.layer_sides import PARTS, Data, Layer, SparseConv, dense_side, graph_layout
from swatfx.tensors import layouts
from tests.nets.runners import check_spread, run_quick

pytestmark = pytest.mark.usefixtures("spare_time")
_LAYER = Layer(3, 8, 12, 6, 4)


def test_layers(capsys: pytest.CaptureFixture[str]) -> None:
    measured = run_quick(layers, capsys, "--sparsities", "0.8", "0.9")
    names = ["3x3 16 at 8, batch 16", "1x1 16->32 at 8, batch 16"]
    assert [result["layer"] for result in measured["layers"]] == names
    for result in measured["layers"]:
        assert result["fastest_dense"] in result["dense"] and result["unavailable"] == {}
        assert set(result["sparse"]) == {"0.8", "0.9"}
        for sparse in result["sparse"].values():
            assert set(sparse["speedups"]) == set(layers.SPARSE)
            for values in sparse["speedups"].values():
                check_spread(values)
                assert values["minimum"] > 0
            assert sparse["converted_from"] in ("nchw", "channels_last")
            assert list(sparse["parts"]) == list(PARTS)
            assert sum(part["share"] for part in sparse["parts"].values()) == pytest.approx(1)
    means = measured["geometric_means"]["0.8"]
    medians = [r["sparse"]["0.8"]["speedups"]["kernels"]["median"] for r in measured["layers"]]
    assert means["kernels"]["geometric_mean"] == pytest.approx((medians[0] * medians[1]) ** 0.5)
    assert means["kernels"]["wanted"] == 2.0 and means["period_1"]["wanted"] == 1.5
    assert "wanted" not in means["period_1000"]


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
    result = layers.measure_layer(_LAYER, [0.8], 1, True, lambda: None)
    assert result["unavailable"] == {"dense compiled": "RuntimeError: no C++ compiler"}
    assert set(result["dense"]) == {"dense nchw", "dense channels_last"}


@pytest.mark.slow
def test_torch_compile_compiles_forward_and_backward() -> None:
    torch._dynamo.reset()
    data = Data(_LAYER)
    run = dense_side(data, layouts.CHANNELS_LAST, compiled=True)
    run()
    x, grad = data.of(layouts.CHANNELS_LAST)
    plain = torch.nn.grad.conv2d_input(x.shape, data.weight, grad, padding=1)
    torch.testing.assert_close(x.grad, plain, rtol=1e-3, atol=1e-4)
