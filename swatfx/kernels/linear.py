"""`swatfx::linear` and its backward on CPUs: the sparse kernels of pointwise convolutions.

Rows are laid innermost for the two products with sparse weights, and back again; the weight
gradient reads the packed rows as they are. Taken in float32, where the op was told to, from
`LEAST_ROWS` rows on: with fewer, dense products are bound by reading the weight, as these are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from swatfx import bits, selectors
from swatfx.kernels import library
from swatfx.kernels.conv import PACKED, run_problem, sparse_weight
from swatfx.kernels.problems import Shapes, forward_problem, input_gradient_problems
from swatfx.layouts import BATCH_INNERMOST
from swatfx.ops.conv import stored_dtype
from swatfx.ops.layout import converted
from swatfx.ops.linear import (
    linear,
    linear_backward,
    linear_backward_reference,
    linear_reference,
)
from swatfx.ops.where import (
    SWAT,
    Where,
    kept_only,
    not_a_view,
    reaching_gradient,
    sparse_gradient,
)
from swatfx.selectors import Axes

LEAST_ROWS = 16


class LinearProblem(ctypes.Structure):
    """A weight gradient; `linear_problem` in csrc/linear.h."""

    _fields_ = [(n, ctypes.c_int64) for n in ("rows", "inputs", "outputs", "threads", "half")]


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, asked: bool) -> bool:
    rows = x.numel() // max(x.shape[-1], 1)
    plain = all(t is None or t.dtype is torch.float32 for t in (x, weight, bias))
    return asked and plain and library.available() and rows >= LEAST_ROWS and weight.numel() > 0


@linear.register_kernel("cpu")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_state: Tensor,
    kept: Tensor | None,
    sparse: str = SWAT,
    weight_selector: str = "nchw",
    activation_state: Tensor | None = None,
    activation_selector: str = "nchw",
    gradient_density: str = "",
    gradient_selector: str = "nchw",
    kept_dtype: torch.dtype | None = None,
    sparse_kernels: bool = False,
) -> Tensor:
    where = Where.parse(sparse)
    if not _fits(input, weight, bias, sparse_kernels) or not where.forward_weight:
        return linear_reference(
            input,
            weight,
            bias,
            weight_state,
            kept,
            sparse,
            weight_selector,
            activation_state,
            activation_selector,
            gradient_density,
            gradient_selector,
            kept_dtype,
            sparse_kernels,
        )
    if where.forward_activation and activation_state is not None:
        axes = Axes.of(input.dim(), 0, False)
        keep = selectors.get(activation_selector).keep(input, activation_state, axes)
        input = kept_only(input, keep)
    outputs, inputs = weight.shape
    rows = input.reshape(-1, inputs)
    used, threshold = sparse_weight(weight, weight_state, weight_selector)
    problem = forward_problem(_shapes(rows, weight), (inputs, 1, 1, 1))
    out = rows.new_empty(outputs, rows.shape[0])
    run_problem(
        problem,
        _transposed(rows),
        used,
        None if bias is None else bias.contiguous(),
        out,
        threshold,
    )
    return not_a_view(_transposed(out).view(*input.shape[:-1], outputs))


def _shapes(rows: Tensor, weight: Tensor) -> Shapes:
    """A linear layer as a pointwise convolution: rows are images of one position."""
    one = (1, 1)
    sizes = (rows.shape[0], weight.shape[1], 1, 1, weight.shape[0])
    return Shapes(*sizes, one, one, (0, 0), one, 1)


def _transposed(matrix: Tensor) -> Tensor:
    """A row-major copy of the transpose of a matrix."""
    rows, columns = matrix.shape
    turned = converted(matrix.contiguous().view(rows, columns, 1), BATCH_INNERMOST)
    return turned.movedim(0, -1).reshape(columns, rows)


@linear_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    input: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    weight_state: Tensor,
    input_shape: Sequence[int],
    sparse: str,
    weight_selector: str,
    gradient_density: str,
    gradient_selector: str,
    wants: Sequence[bool],
    kept_dtype: torch.dtype | None = None,
    sparse_kernels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    where = Where.parse(sparse)

    def reference(wants: Sequence[bool], grad: Tensor, density: str) -> tuple[Tensor, ...]:
        return linear_backward_reference(
            grad,
            input,
            kept,
            weight,
            weight_state,
            input_shape,
            sparse,
            weight_selector,
            density,
            gradient_selector,
            wants,
            kept_dtype,
            sparse_kernels,
        )

    if not _fits(grad, weight, None, sparse_kernels):
        first, second, third = reference(wants, grad, gradient_density)
        return first, second, third
    outputs, inputs = weight.shape
    bias_grad = grad.reshape(-1, outputs).sum(0) if wants[2] else grad.new_empty(0)
    if where.gradient and gradient_density:
        grad = sparse_gradient(grad, gradient_density, gradient_selector, 0)
    rows = grad.reshape(-1, outputs)
    input_grad, weight_grad = grad.new_empty(0), grad.new_empty(0)
    if wants[0] and where.backward_weight:
        used, threshold = sparse_weight(weight, weight_state, weight_selector)
        out = rows.new_empty(inputs, rows.shape[0])
        for problem in input_gradient_problems(_shapes(rows, weight), (inputs, 1, 1, 1)):
            run_problem(problem, _transposed(rows), used, None, out, threshold)
        input_grad = not_a_view(_transposed(out).view(tuple(input_shape)))
    elif wants[0]:
        input_grad = reference((True, False, False), grad, "")[0]
    stored = stored_dtype(grad, kept_dtype)
    if wants[1] and input is None and kept is not None and stored in PACKED:
        weight_grad = _weight_gradient(rows, kept, weight, stored is torch.bfloat16)
        if where.active_only:
            weight_grad = reaching_gradient(weight_grad, weight, weight_state, weight_selector)
    elif wants[1]:
        weight_grad = reference((False, True, False), grad, "")[1]
    return input_grad, weight_grad, bias_grad


def _weight_gradient(rows: Tensor, kept: Tensor, weight: Tensor, half: bool) -> Tensor:
    outputs, inputs = weight.shape
    rows = rows.contiguous()
    problem = LinearProblem(rows.shape[0], inputs, outputs, torch.get_num_threads(), int(half))
    out = torch.empty(outputs, inputs)
    failed = library.function("sparse_linear_weight_gradient", ctypes.c_int)(
        ctypes.byref(problem),
        library.pointer(kept),
        library.size(bits.header_bytes(rows.shape[0] * inputs)),
        library.pointer(rows),
        library.pointer(out),
    )
    if failed:
        raise MemoryError("a sparse weight gradient could not allocate its buffers")
    return out if weight.is_contiguous() else torch.empty_like(weight).copy_(out)
