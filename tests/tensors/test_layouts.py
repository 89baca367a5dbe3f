"""Layouts: what a tensor's memory order is called, and getting there and back."""

from __future__ import annotations

import pytest
import torch

from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST, CHANNELS_LAST, ROW_MAJOR


@pytest.mark.parametrize("layout", [ROW_MAJOR, CHANNELS_LAST, BATCH_INNERMOST])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 2)])
def test_round_trip(shape: tuple[int, ...], layout: str) -> None:
    x = torch.randn(shape)
    y = layouts.as_layout(x, layout)
    assert torch.equal(x, y) and layouts.layout_of(y) == layout
    assert layouts.as_layout(y, layout).data_ptr() == y.data_ptr()
    flat = layouts.flat_view(y, layout)
    assert flat.data_ptr() == y.data_ptr()  # no copy
    back = layouts.from_flat(flat, shape, layout)
    assert torch.equal(back, x) and back.stride() == y.stride()
    made = layouts.empty(shape, layout, dtype=x.dtype)
    assert made.stride() == y.stride()


def test_channels_last_is_torchs() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert layouts.layout_of(x) == CHANNELS_LAST
    x = torch.randn(2, 3, 4, 5, 2).contiguous(memory_format=torch.channels_last_3d)
    assert layouts.layout_of(x) == CHANNELS_LAST


def test_batch_innermost_is_channel_then_space_then_image() -> None:
    x = layouts.as_layout(torch.arange(24.0).view(2, 3, 2, 2), BATCH_INNERMOST)
    assert x.stride() == (1, 8, 4, 2)
    assert torch.equal(x + x, 2 * x.contiguous())
    assert layouts.layout_of(torch.relu(x)) == BATCH_INNERMOST  # elementwise ops keep it


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (3, 4), (2, 3, 4), (1, 3, 4, 5)])
def test_what_is_row_major_too_is_called_row_major(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert layouts.layout_of(x) == ROW_MAJOR
    if shape[0] == 1:
        assert layouts.layout_of(layouts.as_layout(x, BATCH_INNERMOST)) == ROW_MAJOR
    if len(shape) == 4 and (shape[1] == 1 or shape[2:] == (1, 1)):
        assert layouts.layout_of(x.to(memory_format=torch.channels_last)) == ROW_MAJOR
