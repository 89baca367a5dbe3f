"""`swatfx::linear` and its backward on CPUs: the sparse kernels of pointwise convolutions.

Rows are laid innermost for the two products with sparse weights, and back again, unless they lie so
already ("features_major") and are to go on doing so. The weight gradient reads the packed rows as
they are, or, where they were packed in that order, by the kernel of convolutions. Taken in float32
and bfloat16, where the op was told to; backward from `LEAST_ROWS` rows on: with fewer, dense
products are bound by reading the weight, as these are.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swatfx.kernels import fitting, library
from swatfx.kernels.conv import (
    as_weight,
    run_forward,
    run_problem,
    run_sampled,
    run_weight_gradient,
    sparse_weight,
    succeeded,
)
from swatfx.kernels.layout import transpose_into
from swatfx.kernels.problems import (
    Shapes,
    forward_problem,
    input_gradient_problems,
)
from swatfx.ops.calls import LinearCall, Saved
from swatfx.ops.linear import (
    input_in_forward,
    linear,
    linear_backward,
    linear_backward_reference,
    linear_reference,
)
from swatfx.ops.pack import order_of
from swatfx.ops.saved import not_a_view
from swatfx.tensors import bits
from swatfx.tensors.layouts import (
    FEATURES_OUTERMOST,
    IMAGES_INNERMOST,
    ROW_MAJOR,
    elementwise_layout_of,
    features_first,
    images_behind,
)

LEAST_ROWS = 16
_LINE = 64  # bytes


class LinearProblem(ctypes.Structure):
    """A weight gradient; `linear_problem` in csrc/problems.h."""

    _fields_ = [(n, ctypes.c_int64) for n in ("rows", "inputs", "outputs", "threads", "half")]


def _rows(
    shape: Sequence[int], weight: Tensor, last: int, asked: bool, least: int = 1
) -> int | None:
    """Rows of a matrix that a sparse layer reads or writes; None if that cannot run here.

    Args:
        shape: of the input or the output gradient.
        weight: (out, in).
        last: which dimension of `weight` the last of `shape` has to equal.
        asked: whether the op was told to run sparse.
        least: fewer are too few.
    """
    if not asked or not library.available():
        return None
    if weight.dim() != 2 or not shape or not weight.numel() or shape[-1] != weight.shape[last]:
        return None
    rows = torch.Size(shape[:-1]).numel()
    return rows if rows >= least and weight.shape[1] <= fitting.INT32 else None


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
    shape = torch.Size((*input.shape[:-1], weight.shape[0]))
    rows = _matrix(input_in_forward(call, input), call.layout)
    turned = _turned(rows)

    def run(out: Tensor) -> bool:
        shapes = _shapes(turned, weight)
        return run_forward(shapes, turned, weight, weight_state, call.weight_selector, bias, out)

    return _product(run, turned, shape, call.layout)


def _product(
    run: Callable[[Tensor], bool], turned: Tensor, shape: torch.Size, layout: str
) -> Tensor | None:
    """What `run` makes of `_turned` rows in the order of `layout`; None if it cannot.

    Args:
        run: writes a matrix (features, columns of `turned`).
        turned: what it reads.
        shape: of the result.
        layout: likewise, of `swatfx.tensors.layouts`.
    """
    count, features = shape[:-1].numel(), shape[-1]
    out = turned.new_empty(0)
    made = None
    if layout in FEATURES_OUTERMOST:
        made = library.new(shape, layout, turned.dtype)
        out = features_first(made, layout).view(features, count)
    if out.shape != (features, turned.shape[1]):  # another order, or columns that were filled up
        out = turned.new_empty(features, turned.shape[1])
    if not run(out):
        return None
    if made is None:
        return not_a_view(_turned_back(out, count).view(shape))
    if turned.shape[1] != count:
        features_first(made, layout).view(features, count).copy_(out[:, :count])
    return made


def _matrix(x: Tensor, layout: str) -> Tensor:
    """(rows, features) of `x` (*any, features), its rows in the order of `layout`."""
    return images_behind(x, layout).reshape(-1, x.shape[-1])


def _shapes(turned: Tensor, weight: Tensor) -> Shapes:
    """A linear layer as a pointwise convolution: columns of `turned` are images of one position."""
    one = (1, 1)
    sizes = (turned.shape[1], weight.shape[1], 1, 1, weight.shape[0])
    return Shapes(*sizes, one, one, (0, 0), one, 1)


def _turned(rows: Tensor) -> Tensor:
    """The transpose of a matrix, row-major, each row whole cache lines, filled with zeros.

    Products take whole vectors in half the time, and whole lines are written past the caches. It is
    no copy where `rows` lies so in memory.
    """
    count, features = rows.shape
    lies_turned = rows.t().is_contiguous()
    fill = -count % (_LINE // rows.itemsize)
    if lies_turned and not fill:
        return rows.t()
    out = rows.new_empty(features, count + fill)
    out[:, count:].zero_()
    if lies_turned:
        out[:, :count].copy_(rows.t())
    else:
        transpose_into(rows.contiguous(), out[:, :count])
    return out


def _turned_back(turned: Tensor, count: int) -> Tensor:
    """The first `count` columns of a matrix whose rows are in one piece each, as rows."""
    out = turned.new_empty(count, len(turned))
    transpose_into(turned[:, :count], out)
    return out


@linear_backward.register_kernel("cpu")
def _(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved, call = Saved.split(rest, LinearCall)
    input, kept, weight, weight_state, input_shape, wants = saved
    count = _rows(grad.shape, weight, 0, call.sparse_kernels, LEAST_ROWS)
    shape = torch.Size(input_shape)
    fits = fitting.are_elements(grad, weight) and shape == (*grad.shape[:-1], weight.shape[1])
    if count is None or not fits:
        return linear_backward_reference(grad, *rest)
    bias_grad = _matrix(grad, elementwise_layout_of(grad)).sum(0) if wants[2] else grad.new_empty(0)
    grad = call.gradient(grad, 0)
    layout = call.layout
    turned = functools.cache(lambda order: _turned(_matrix(grad, order)))
    input_grad = weight_grad = reached = None
    if wants[1] and input is not None and input.dtype is grad.dtype:
        reached = call.reached(weight, weight_state)
    if wants[0] and call.where.backward_weight:
        rows = turned(_order(layout))
        used, threshold = sparse_weight(weight, weight_state, call.weight_selector)
        (problem,) = input_gradient_problems(_shapes(rows, weight), (weight.shape[1], 1, 1, 1))

        def run(out: Tensor) -> bool:
            return run_problem(problem, rows, used, None, out, threshold)

        input_grad = _product(run, rows, shape, layout)
    if wants[1] and input is None and kept is not None:
        packed_in, stored = order_of(kept), call.stored_dtype(grad)
        if packed_in in FEATURES_OUTERMOST:
            rows = turned(_order(packed_in))
            weight_grad = _turned_weight_gradient(rows[:, :count], kept, weight, stored)
        else:
            weight_grad = _weight_gradient(_matrix(grad, ROW_MAJOR), kept, weight, stored)
        if weight_grad is not None:
            weight_grad = call.weight_gradient(weight_grad, weight, weight_state)
    if reached is not None and input is not None:
        rows = turned(_order(layout))
        weight_grad = _sampled_gradient(rows, _matrix(input, layout), weight, reached)
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


def _order(layout: str) -> str:
    """The first layout whose rows come in the order of those of `layout`."""
    return layout if layout == IMAGES_INNERMOST else ROW_MAJOR


def _sampled_gradient(
    turned: Tensor, input: Tensor, weight: Tensor, reached: Tensor
) -> Tensor | None:
    """For `_turned` rows; zero where it does not reach. None if the kernels cannot run it."""
    problem = forward_problem(_shapes(turned, weight), (weight.shape[1], 1, 1, 1))
    return run_sampled(problem, reached, _turned(input), turned, weight)


def _turned_weight_gradient(
    turned: Tensor, kept: Tensor, weight: Tensor, stored: torch.dtype
) -> Tensor | None:
    """As `_weight_gradient`, by (outputs, rows), in the order of rows in which `kept` is packed."""
    seen = turned.contiguous()
    return run_weight_gradient(_shapes(seen, weight), kept, order_of(kept), stored, seen, weight)


def _weight_gradient(
    rows: Tensor, kept: Tensor, weight: Tensor, stored: torch.dtype
) -> Tensor | None:
    """In the memory order of `weight`; None if `kept` is not what the kernels read.

    Args:
        rows: of the output gradient.
        kept: the packed activation, in row-major order.
        weight: that it is the gradient of.
        stored: dtype of packed values.
    """
    (count, _), (outputs, inputs) = rows.shape, weight.shape
    values = fitting.packed_values(kept, count * inputs, stored, ROW_MAJOR)
    if values is None or stored not in library.ELEMENTS:
        return None
    rows = _turned_back(rows.t(), count) if rows.t().is_contiguous() else rows.contiguous()
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
