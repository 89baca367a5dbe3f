"""benchmarks.bounds and .rates: amounts by hand, counts by plain sorts, rates that can be."""

from __future__ import annotations

import pathlib

import pytest
import torch

from benchmarks import rates
from benchmarks.bounds import PRODUCTS, Kept, amounts, counted, reached
from benchmarks.layer_sides import Data, Layer, SparseConv
from benchmarks.rates import NoProbeError, Rates, measured_rates
from swatfx import kernels
from swatfx.tensors import layouts

# 3x3, 2 -> 5 channels, 4x4 pixels, 8 images: 128 positions; 90 weights.
_LAYER = Layer(3, 2, 5, 4, 8)
_KEPT = Kept(weights=9, activations=30, packed_bytes=152)
_RATES = Rates(fma=1000.0, dot=2000.0, l1=4000.0, l2=1000.0, memory=100.0)


def test_amounts_of_a_small_layer_are_those_counted_by_hand() -> None:
    fp32, bf16 = (amounts(_LAYER, dtype, _KEPT) for dtype in ("fp32", "bf16"))
    assert tuple(fp32) == tuple(bf16) == PRODUCTS
    for name in ("forward", "input_gradient"):
        # 9 weights at 128 positions; input 2 x 128, output 5 x 128, and 90 float32 weights.
        assert fp32[name].products == bf16[name].products == 1152
        assert (fp32[name].loaded, bf16[name].loaded) == (4608, 2304)
        assert (fp32[name].moved, bf16[name].moved) == (1024 + 2560 + 360, 512 + 1280 + 360)
    # 30 activations, each at 9 kernel positions for 5 filters; 152 bytes packed.
    for found, size in ((fp32["weight_gradient"], 4), (bf16["weight_gradient"], 2)):
        assert found.products == 1350
        assert found.loaded == 1350 * size
        assert found.moved == 152 + 640 * size + 360


def test_bounds_are_amounts_over_rates_and_the_largest_counts() -> None:
    fp32, bf16 = (amounts(_LAYER, dtype, _KEPT)["forward"] for dtype in ("fp32", "bf16"))
    found = reached(fp32, _RATES, "fp32", {"median": 78.88})
    assert found["seconds"] == pytest.approx(
        {"load": 1.152, "load_l2": 4.608, "multiply": 1.152, "memory": 39.44}
    )
    assert found["largest"] == "memory" and found["reached"] == pytest.approx(0.5)
    near = Rates(fma=1000.0, dot=2000.0, l1=1000.0, l2=100.0, memory=1e6)
    found = reached(bf16, near, "bf16", {"median": 4.608})
    assert found["seconds"]["multiply"] == pytest.approx(0.576)  # by the dot product
    assert found["seconds"]["load"] == pytest.approx(2.304)
    # Loads from the second level are told, but bound nothing: some come from the first.
    assert found["seconds"]["load_l2"] == pytest.approx(23.04)
    assert found["largest"] == "load" and found["reached"] == pytest.approx(0.5)


def test_without_a_dot_product_bf16_multiplies_as_floats_do() -> None:
    plain = Rates(fma=1000.0, dot=None, l1=1.0, l2=1.0, memory=1.0)
    assert plain.products("bf16") == plain.products("fp32") == 1000.0
    assert (_RATES.products("bf16"), _RATES.products("fp32")) == (2000.0, 1000.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tenths", [5, 9])
def test_counts_are_of_the_masks(dtype: str, tenths: int) -> None:
    data = Data(Layer(3, 8, 12, 6, 4))
    x, _ = data.of(layouts.ROW_MAJOR, dtype)
    with torch.no_grad():
        x.view(-1)[:700] = (
            0  # of 1152, half of which the ReLU took: zeros that rank, but do not count
        )
        data.weight.view(-1)[:600] = 0  # of 864
    found = counted(SparseConv(data, tenths / 10, 1, layouts.ROW_MAJOR, dtype))

    def kept(values: torch.Tensor) -> int:
        """Those that reach the last one of Top-K, and are not zero."""
        flat = values.detach().double().abs().flatten()
        least = flat.topk(-(-flat.numel() * (10 - tenths) // 10)).values[-1]
        return int(((flat >= least) & (flat > 0)).sum())

    assert found.weights == kept(data.weight)
    assert found.activations == kept(x)
    size = 2 if dtype == "bf16" else 4
    assert found.packed_bytes == x.numel() // 8 + found.activations * size


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
def test_rates_are_of_a_machine() -> None:
    try:
        found = measured_rates()
    except NoProbeError as error:
        pytest.skip(str(error))
    assert found.memory > 1e8 and found.fma > 1e8
    assert found.l1 > found.memory
    has_dot = kernels.instruction_set() == "avx512bf16"
    assert (found.dot is not None) == has_dot
    assert found.to_json()["l2"] == found.l2


def test_a_compiler_that_fails_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such option' >&2\necho more >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(rates.shutil, "which", lambda name: str(compiler))
    with pytest.raises(NoProbeError, match=r"^the C compiler fails: no such option$"):
        measured_rates()
    compiler.write_text("#!/no/such/shell\n")
    with pytest.raises(NoProbeError, match="^the C compiler does not run: "):
        measured_rates()


def test_reference_kernels_have_no_bounds() -> None:
    with kernels.reference_only(), pytest.raises(NoProbeError, match="reference kernels"):
        measured_rates()


def test_a_probe_without_memory_measures_nothing() -> None:
    with pytest.raises(NoProbeError, match="too little memory"):
        rates._rates(lambda what, size, *rest: 0.0 if size > 2**20 else 1.0)
