"""Whole tensors in codes (`swatfx.ops.codes`) in C: csrc/coded.c.

Fast are float32 and bfloat16 vectors; all else runs the reference.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from swatfx.kernels import fitting, library
from swatfx.kernels.library import pointer, result, size
from swatfx.ops import codes


def _fits(x: Tensor, dtype: torch.dtype) -> bool:
    return library.available() and x.device.type == "cpu" and dtype in library.ELEMENTS


@codes.encode_flat.register_kernel
def _encode(x: Tensor, saves: str) -> Tensor | None:
    if not _fits(x, x.dtype) or x.dim() != 1 or not x.numel() or not x.is_contiguous():
        return None
    room = codes.Room(1, x.numel(), codes.BITS[saves])
    code = torch.empty(room.total, dtype=torch.uint8)
    code[room.used : room.header] = 0
    library.function("swatfx_encode", elements=x.dtype)(
        pointer(x),
        pointer(code[room.header :]),
        pointer(code),
        size(x.numel()),
        ctypes.c_int(room.bits),
        ctypes.c_uint32(codes.seed()),
        library.threads(),
    )
    return code


@codes.decode_flat.register_kernel
def _decode(code: Tensor, elements: int, saves: str, dtype: torch.dtype) -> Tensor | None:
    room = codes.Room(1, elements, codes.BITS[saves])
    aligned = code.storage_offset() % 4 == 0
    if not _fits(code, dtype) or not aligned or not fitting.holds_bytes(code, room.total):
        return None
    x = torch.empty(elements, dtype=dtype)
    library.function("swatfx_decode", elements=dtype)(
        pointer(code[room.header :]),
        pointer(code),
        result(x),
        size(elements),
        ctypes.c_int(room.bits),
        library.threads(),
    )
    return x
