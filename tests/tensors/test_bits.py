"""Packed tensors: what goes in comes out, and how many bytes it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swatfx.tensors import bits

SETTINGS = settings(deadline=None, max_examples=100)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@SETTINGS
@given(st.lists(st.booleans(), max_size=200))
def test_mask_round_trip(flags: list[bool]) -> None:
    mask = torch.tensor(flags, dtype=torch.bool)
    packed = bits.mask_to_bits(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == (len(flags) + 7) // 8
    assert torch.equal(bits.bits_to_mask(packed, len(flags)), mask)


def test_bit_order_is_that_of_the_docstring() -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[0, 3, 9]] = True
    assert bits.mask_to_bits(mask).tolist() == [1 + 8, 2]


@SETTINGS
@given(st.integers(0, 300), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_pack_round_trip(elements: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(elements, generator=generator).to(dtype)
    keep = torch.rand(elements, generator=generator) < 0.4
    packed = bits.pack(x, keep, dtype)
    size = bits.header_bytes(elements) + int(keep.sum()) * dtype.itemsize
    assert packed.dtype == torch.uint8 and packed.shape == (size,)
    assert torch.equal(bits.unpack(packed, elements, dtype), x.masked_fill(~keep, 0))


@pytest.mark.parametrize("elements", [0, 1, 63, 64, 65, 1000])
def test_header_holds_the_mask_and_aligns_the_values(elements: int) -> None:
    header = bits.header_bytes(elements)
    assert header % 8 == 0 and (elements + 7) // 8 <= header < (elements + 7) // 8 + 8


def test_values_are_stored_in_the_dtype_asked_for() -> None:
    x = torch.tensor([1.0 + 2**-10, 0.0, -3.0])
    packed = bits.pack(x, x != 0, torch.bfloat16)
    assert packed.numel() == 8 + 2 * 2
    assert bits.unpack(packed, 3, torch.bfloat16).tolist() == [1.0, 0.0, -3.0]


def test_nan_inf_and_sign_survive() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.5, 0.0])
    out = bits.unpack(bits.pack(x, x != 0, x.dtype), 5, x.dtype)
    torch.testing.assert_close(out, x, rtol=0, atol=0, equal_nan=True)
