"""`swatfx::linear` and its backward on CPUs: the sparse kernels of pointwise convolutions.

Rows are laid innermost for the two products with sparse weights, and back again; the weight
gradient reads the packed rows as they are. Taken in float32 and bfloat16, where the op was told to,
from `LEAST_ROWS` rows on: with fewer, dense products are bound by reading the weight, as these are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swatfx.kernels import fitting, library
from swatfx.kernels.conv import as_weight, run_problem, run_sampled, sparse_weight, succeeded
from swatfx.kernels.layout import transpose_into
from swatfx.kernels.problems import Shapes, forward_problem, input_gradient_problems
from swatfx.ops.calls import LinearCall, Saved
from swatfx.ops.linear import (
    input_in_forward,
    linear,
    linear_backward,
    linear_backward_reference,
    linear_reference,
)
from swatfx.ops.where import not_a_view
from swatfx.tensors import bits
from swatfx.tensors.layouts import ROW_MAJOR

LEAST_ROWS = 16
_LINE = 64  # bytes


class LinearProblem(ctypes.Structure):
    """A weight gradient; `linear_problem` in csrc/problems.h."""

    _fields_ = [(n, ctypes.c_int64) for n in ("rows", "inputs", "outputs", "threads", "half")]


def _rows(shape: Sequence[int], weight: Tensor, last: int, asked: bool) -> int | None:
    """Rows of a matrix that a sparse layer reads or writes; None if that cannot run here.

    Args:
        shape: of the input or the output gradient.
        weight: (out, in).
        last: which dimension of `weight` the last of `shape` has to equal.
        asked: whether the op was told to run sparse.
    """
    if not asked or not library.available():
        return None
    if weight.dim() != 2 or not shape or not weight.numel() or shape[-1] != weight.shape[last]:
        return None
    rows = torch.Size(shape[:-1]).numel()
    return rows if rows >= LEAST_ROWS and weight.shape[1] <= fitting.INT32 else None


@linear.register_kernel("cpu")
def _(*given: Any) -> Tensor:
    out = _forward(LinearCall(*given[5:]), *given[:4])
    return linear_reference(*given) if out is None else out


def _forward(
    call: LinearCall, input: Tensor, weight: Tensor, bias: Tensor | None, weight_state: Tensor
) -> Tensor | None:
    """None if the kernels cannot run it."""
    count = _rows(input.shape, weight, 1, call.sparse_kernels)
    if count is None or not call.where.forward_weight or not fitting.are_elements(input, weight):
        return None
    if not fitting.is_bias(bias, input, weight):
        return None
    outputs, inputs = weight.shape
    rows = input_in_forward(call, input).reshape(count, inputs)
    used, threshold = sparse_weight(weight, weight_state, call.weight_selector)
    turned = _turned(rows)
    problem = forward_problem(_shapes(turned, weight), (inputs, 1, 1, 1))
    out = rows.new_empty(outputs, turned.shape[1])
    if not run_problem(problem, turned, used, bias, out, threshold):
        return None
    return not_a_view(_turned_back(out, count).view(*input.shape[:-1], outputs))


def _shapes(turned: Tensor, weight: Tensor) -> Shapes:
    """A linear layer as a pointwise convolution: columns of `turned` are images of one position."""
    one = (1, 1)
    sizes = (turned.shape[1], weight.shape[1], 1, 1, weight.shape[0])
    return Shapes(*sizes, one, one, (0, 0), one, 1)


def _turned(rows: Tensor) -> Tensor:
    """A row-major copy of the transpose of a matrix, each row whole cache lines, filled with zeros.

    Products take whole vectors in half the time, and whole lines are written past the caches.
    """
    count, features = rows.shape
    out = rows.new_empty(features, count + -count % (_LINE // rows.itemsize))
    out[:, count:].zero_()
    transpose_into(rows.contiguous(), out[:, :count])
    return out


def _turned_back(turned: Tensor, count: int) -> Tensor:
    """The first `count` columns of a row-major matrix, as rows."""
    out = turned.new_empty(count, len(turned))
    transpose_into(turned[:, :count], out)
    return out


@linear_backward.register_kernel("cpu")
def _(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved, call = Saved.split(rest, LinearCall)
    input, kept, weight, weight_state, input_shape, wants = saved
    count = _rows(grad.shape, weight, 0, call.sparse_kernels)
    shape = torch.Size(input_shape)
    fits = fitting.are_elements(grad, weight) and shape == (*grad.shape[:-1], weight.shape[1])
    if count is None or not fits:
        return linear_backward_reference(grad, *rest)
    outputs = weight.shape[0]
    bias_grad = grad.reshape(count, outputs).sum(0) if wants[2] else grad.new_empty(0)
    grad = call.gradient(grad, 0)
    rows = grad.reshape(count, outputs)
    input_grad = weight_grad = reached = None
    if wants[1] and input is not None and input.dtype is grad.dtype:
        reached = call.reached(weight, weight_state)
    sparse_input = wants[0] and call.where.backward_weight
    turned = _turned(rows) if sparse_input or reached is not None else None
    if sparse_input and turned is not None:
        used, threshold = sparse_weight(weight, weight_state, call.weight_selector)
        input_grad = _input_gradient(turned, used, threshold, shape)
    if wants[1] and input is None and kept is not None:
        weight_grad = _weight_gradient(rows, kept, weight, call.stored_dtype(grad))
        if weight_grad is not None:
            weight_grad = call.weight_gradient(weight_grad, weight, weight_state)
    if reached is not None and turned is not None and input is not None:
        weight_grad = _sampled_gradient(turned, input.reshape(count, -1), weight, reached)
    left = wants[0] and input_grad is None, wants[1] and weight_grad is None, False
    rest = (grad.new_empty(0), grad.new_empty(0))
    if any(left):
        dense = replace(call, gradient_density="")  # its Top-K is taken already
        rest = linear_backward_reference(grad, *saved._replace(wants=left), *dense.options)[:2]
    return (
        rest[0] if input_grad is None else input_grad,
        rest[1] if weight_grad is None else weight_grad,
        bias_grad,
    )


def _input_gradient(
    turned: Tensor, weight: Tensor, threshold: float, shape: torch.Size
) -> Tensor | None:
    """Of `shape`, for `_turned` rows; None if the kernels cannot run it."""
    inputs = weight.shape[1]
    out = turned.new_empty(inputs, turned.shape[1])
    for problem in input_gradient_problems(_shapes(turned, weight), (inputs, 1, 1, 1)):
        if not run_problem(problem, turned, weight, None, out, threshold):
            return None
    return not_a_view(_turned_back(out, shape[:-1].numel()).view(shape))


def _sampled_gradient(
    turned: Tensor, input: Tensor, weight: Tensor, reached: Tensor
) -> Tensor | None:
    """For `_turned` rows; zero where it does not reach. None if the kernels cannot run it."""
    problem = forward_problem(_shapes(turned, weight), (weight.shape[1], 1, 1, 1))
    return run_sampled(problem, reached, _turned(input), turned, weight)


def _weight_gradient(
    rows: Tensor, kept: Tensor, weight: Tensor, stored: torch.dtype
) -> Tensor | None:
    """In the memory order of `weight`; None if `kept` is not what the kernels read."""
    (count, _), (outputs, inputs) = rows.shape, weight.shape
    values = fitting.packed_values(kept, count * inputs, stored, ROW_MAJOR)
    if values is None or stored not in library.ELEMENTS:
        return None
    rows = rows.contiguous()
    half = stored is torch.bfloat16
    problem = LinearProblem(count, inputs, outputs, torch.get_num_threads(), int(half))
    out = torch.empty(outputs, inputs)
    name = "sparse_linear_weight_gradient"
    failed = library.function(name, ctypes.c_int, elements=rows.dtype)(
        ctypes.byref(problem),
        library.pointer(kept),
        library.size(bits.header_bytes(count * inputs)),
        library.size(values),
        library.pointer(rows),
        library.result(out),
    )
    if not succeeded(failed, "a sparse weight gradient"):
        return None
    return as_weight(out, weight)
