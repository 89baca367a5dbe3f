"""Sparse weights as the products read them, made once a weight: csrc/rows.c.

In evaluation without gradients a state stands for one weight until that changes
(`swatfx.ops.current`): what is made of the two is kept beside it, for a few sizes of input. To make
it anew at every call takes as long as to read the dense weight, which is most of the time where
there is one image.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swatfx.kernels import library
from swatfx.kernels.problems import Problem
from swatfx.tensors import keeping

_MOST = 4  # sizes of input


class Rows(NamedTuple):
    """What is kept of one weight for one problem.

    Attributes:
        problem: that it is for.
        made: uint8, as `sparse_conv_rows` in csrc/exports.h writes it.
        looks: the weight's address and version.
    """

    problem: Problem
    made: Tensor
    looks: tuple[int, int]


def find(weight: Tensor, state: Tensor, key: Any) -> Rows | None:
    """What is kept beside `state` for the problem that `key` tells, of `weight` as it is."""
    kept = keeping.kept(state)
    rows: Rows | None = kept.get(key) if kept else None
    return rows if rows is not None and rows.looks == _looks(weight) else None


def keep(
    weight: Tensor, state: Tensor, key: Any, problem: Problem, used: Tensor, threshold: float
) -> Tensor | None:
    """Make and keep the rows of `weight`, if something may be kept beside `state`.

    Args:
        weight: the layer's.
        state: its selection state.
        key: tells the problem, its threads, and last the activation's dtype.
        problem: a convolution, forward.
        used: float32, what `problem` reads of the weight.
        threshold: of `used`, below which nothing counts.

    Returns:
        uint8, for `sparse_conv`; None if it had better make them itself.

    Raises:
        MemoryError: no room for its buffers.
    """
    kept = keeping.kept(state)
    if kept is None or weight.is_inference():
        return None
    size = _write(problem, used, threshold, key[-1], torch.empty(0, dtype=torch.uint8))
    if not size:
        return None
    made = torch.empty(size, dtype=torch.uint8, device="cpu")
    _write(problem, used, threshold, key[-1], made)
    while len(kept) >= _MOST:
        del kept[next(iter(kept))]
    kept[key] = Rows(problem, made, _looks(weight))
    return made


def _write(problem: Problem, used: Tensor, threshold: float, dtype: torch.dtype, to: Tensor) -> int:
    """Bytes that the rows take; they are in `to` if it has as many."""
    size = library.function("sparse_conv_rows", ctypes.c_int64, elements=dtype)(
        ctypes.byref(problem),
        library.pointer(used),
        library.real(threshold),
        library.result(to),
        library.size(to.numel()),
    )
    if size < 0:
        raise MemoryError("sparse weights could not be laid out for a product")
    return int(size)


def _looks(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version
