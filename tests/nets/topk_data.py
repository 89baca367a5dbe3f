"""Data that Top-K finds hard, and a comparison of kernels with references, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swatfx import kernels, selectors
from swatfx.density import Density
from swatfx.selectors import Axes
from swatfx.tensors.layouts import BATCH_INNERMOST, CHANNELS_LAST, ROW_MAJOR

LAYOUTS = [ROW_MAJOR, CHANNELS_LAST, BATCH_INNERMOST]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SELECTORS = ["nchw", "chw", "hw"]
# Around a vector, a word of the mask, what is searched by bisection, and a thread's least share.
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 1023, 1024, 1025, 4097, 131071, 131072, 131073, 262200]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
KINDS = ["normal", "relu", "ties", "equal", "zeros", "wild", "sorted", "two"]


def draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of a kind: ties, zeros, what floats have at their ends, a sorted tensor."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "relu":
        x = x.relu()
    elif kind == "ties":
        x = (x * 3).round()
    elif kind == "equal":
        x = torch.full_like(x, -1.5)
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "sorted":
        x = x.flatten().sort().values.view(shape)
    elif kind == "two":
        x = (x > 1).float()
    x = x.to(dtype)
    if kind == "wild":
        info = torch.finfo(dtype)
        tiny = torch.ones(1, dtype=INTEGERS[dtype.itemsize])  # the bits of the least subnormal
        ends = [0.0, -0.0, torch.inf, -torch.inf, info.max, info.min, info.smallest_normal]
        special = torch.cat([torch.tensor(ends, dtype=dtype), tiny.view(dtype)])
        where = torch.randint(0, 3 * special.numel(), shape, generator=generator)
        x = torch.where(where < special.numel(), special[where % special.numel()], x)
    return x


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, in shape, strides and dtype."""
    if not isinstance(a, Tensor):
        return bool(a == b)
    whole = INTEGERS[a.element_size()]
    alike = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return alike and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def check(run: Callable[[], Any], what: str = "", slow: Any = None) -> Any:
    """Run with the kernels in 1, 2 and 3 threads and with the reference, and compare.

    `slow` is the reference's result where it is known already.
    """
    if slow is None:
        with kernels.reference_only():
            slow = run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        fast = run()
        assert same(fast, slow), f"{threads} threads {what}"
    return fast


def reference_state(x: Tensor, selector: str, density: Density, spatial: int = 2) -> Tensor:
    with kernels.reference_only():
        axes = Axes.of(x.dim(), spatial, False)
        return selectors.get(selector).state(x, density, axes, 0)
