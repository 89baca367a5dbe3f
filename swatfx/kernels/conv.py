"""`swatfx::conv` and its backward on CPUs: sparse C kernels in the layout "batch_innermost".

Taken where the op is asked for that layout, in float32 or bfloat16, 1d or 2d; anything else is the
reference's. In bfloat16 (autocast, say) weights are rounded to it and sums are float32; the weight
gradient is float32 until it takes the weight's dtype.
What a sparse kernel cannot gain from (dense weights, a gradient without a packed activation) is
left to torch's dense kernels, part by part.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swatfx.kernels import fitting, kept_rows, library, problems
from swatfx.kernels.problems import Shapes
from swatfx.ops.calls import ConvCall, Saved
from swatfx.ops.conv import (
    conv,
    conv_backward,
    conv_backward_reference,
    conv_reference,
    input_in_forward,
)
from swatfx.ops.layout import converted
from swatfx.ops.pack import order_of, unpack
from swatfx.ops.where import active_weight
from swatfx.tensors import bits, layouts
from swatfx.tensors.layouts import BATCH_INNERMOST

_DOES_NOT_FIT = 2


@functools.lru_cache(maxsize=1024)
def _forward_problem(shapes: Shapes, strides: tuple[int, ...], threads: int) -> problems.Problem:
    return problems.forward_problem(shapes, strides)


@functools.lru_cache(maxsize=1024)
def _input_problems(
    shapes: Shapes, strides: tuple[int, ...], threads: int
) -> tuple[problems.Problem, ...]:
    return tuple(problems.input_gradient_problems(shapes, strides))


@functools.lru_cache(maxsize=1024)
def _weight_problem(
    shapes: Shapes, strides: tuple[int, ...], half: bool, threads: int
) -> problems.GradientProblem:
    return problems.weight_gradient_problem(shapes, strides, half)


def _dense_filters(weight: Tensor) -> Tensor:
    """`weight` with each filter in one piece, as the kernels read it."""
    if weight.is_contiguous() or layouts.layout_of(weight) == layouts.CHANNELS_LAST:
        return weight
    return weight.contiguous()


def sparse_weight(weight: Tensor, state: Tensor, selector: str) -> tuple[Tensor, float]:
    """(float32 weight, threshold) whose kept elements are the Top-K weights."""
    if weight.dtype is torch.float32 and selector == "nchw" and fitting.is_number(state):
        return _dense_filters(weight), float(state)
    return _dense_filters(active_weight(weight, state, selector, weight.dtype).float()), 0.0


def run_problem(
    problem: problems.Problem,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    threshold: float,
    made: Tensor | None = None,
) -> bool:
    """Run one sum of shifted planes into `out`, of the input's dtype.

    Weights below `threshold` do not count. With what `kept_rows` has `made` of it no weight is
    needed.

    Returns:
        False if a tile with its halo is too large for the kernels.

    Raises:
        MemoryError: no room for its buffers.
    """
    bias = None if bias is None else bias.contiguous().float()
    failed = library.function("sparse_conv", ctypes.c_int, elements=input.dtype)(
        ctypes.byref(problem),
        library.pointer(input),
        library.pointer(weight),
        library.pointer(bias),
        library.result(out),
        library.real(threshold),
        library.pointer(made),
    )
    return succeeded(failed, "a sparse convolution")


def run_forward(
    shapes: Shapes,
    input: Tensor,
    weight: Tensor,
    state: Tensor,
    selector: str,
    bias: Tensor | None,
    out: Tensor,
) -> bool:
    """Run the convolution of `shapes` by Top-K weights into `out`; returns and raises as above."""
    key = shapes, torch.get_num_threads(), input.dtype
    rows = kept_rows.find(weight, state, key)
    if rows is not None:
        return run_problem(rows.problem, input, None, bias, out, 0.0, rows.made)
    used, threshold = sparse_weight(weight, state, selector)
    problem = _forward_problem(shapes, problems.weight_strides(used), torch.get_num_threads())
    made = kept_rows.keep(weight, state, key, problem, used, threshold)
    return run_problem(problem, input, used, bias, out, threshold, made)


def run_sampled(
    problem: problems.Problem, reached: Tensor, input: Tensor, grad: Tensor, weight: Tensor
) -> Tensor | None:
    """A weight gradient where a mask says, and zero elsewhere, in the dtype and order of `weight`.

    Args:
        problem: the forward convolution by a row-major weight.
        reached: the mask, broadcastable to `weight`.
        input: as the convolution had it.
        grad: of its result, of the same dtype.
        weight: that it is the gradient of.

    Returns:
        None if a tile with its halo is too large for the kernels.

    Raises:
        MemoryError: no room for its buffers.
    """
    out = torch.empty(weight.shape, device="cpu")
    open_bits = bits.mask_to_bits(reached.expand(weight.shape))
    failed = library.function("sampled_weight_gradient", ctypes.c_int, elements=input.dtype)(
        ctypes.byref(problem),
        library.pointer(open_bits),
        library.pointer(input),
        library.pointer(grad),
        library.result(out),
    )
    if not succeeded(failed, "a sampled weight gradient"):
        return None
    return as_weight(out, weight)


def as_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """A row-major gradient in the dtype and memory order of `weight`."""
    if weight.is_contiguous():
        return gradient.to(weight.dtype)
    return torch.empty_like(weight).copy_(gradient)


def succeeded(failed: int, what: str) -> bool:
    """What a product's return value says: False if it did not fit.

    Raises:
        MemoryError: no room for its buffers.
    """
    if failed not in (0, _DOES_NOT_FIT):
        raise MemoryError(f"{what} could not allocate its buffers")
    return not failed


@conv.register_kernel("cpu")
def _(*given: Any) -> Tensor:
    out = _forward(ConvCall.of(given[5:]), *given[:4])
    return conv_reference(*given) if out is None else out


def _shapes(call: ConvCall, input_shape: Sequence[int], weight: Tensor) -> Shapes | None:
    """Sizes of the convolution; None if the kernels cannot run it."""
    if call.layout != BATCH_INNERMOST or not library.available():
        return None
    steps = call.stride, call.padding, call.dilation, call.groups
    return fitting.convolution(input_shape, weight, *steps)


def _forward(
    call: ConvCall, input: Tensor, weight: Tensor, bias: Tensor | None, weight_state: Tensor
) -> Tensor | None:
    """None if the kernels cannot run it."""
    shapes = _shapes(call, input.shape, weight) if call.where.forward_weight else None
    if shapes is None or not fitting.are_elements(input, weight):
        return None
    if not fitting.is_bias(bias, input, weight):
        return None
    spatial = weight.dim() - 2
    seen = converted(input_in_forward(call, input, spatial), call.layout)
    size = shapes.out_size[-spatial:]
    out = library.new((shapes.batch, shapes.filters, *size), call.layout, input.dtype)
    if shapes.is_strided_pointwise:
        seen, shapes = _take_strided(seen, shapes), shapes.without_stride()
    done = run_forward(shapes, seen, weight, weight_state, call.weight_selector, bias, out)
    return out if done else None


def _strided(name: str, source: Tensor, result: Tensor, shapes: Shapes) -> Tensor:
    library.function(name, elements=source.dtype)(
        library.pointer(source),
        library.result(result),
        *map(library.size, (shapes.channels, shapes.height, shapes.width, *shapes.stride)),
        library.size(shapes.batch),
        library.threads(),
    )
    return result


def _take_strided(input: Tensor, shapes: Shapes) -> Tensor:
    """The positions that a pointwise convolution with a stride reads, in "batch_innermost"."""
    height, width = shapes.out_size
    shape = (shapes.batch, shapes.channels, height, width)
    out = library.new(shape, BATCH_INNERMOST, input.dtype)
    return _strided("take_strided", input, out, shapes)


def _put_strided(grad: Tensor, input_shape: Sequence[int], shapes: Shapes) -> Tensor:
    """The inverse: zero where nothing was read."""
    out = library.new(input_shape, BATCH_INNERMOST, grad.dtype)
    return _strided("put_strided", grad, out, shapes)


def _weight_gradient(
    shapes: Shapes, kept: Tensor, stored: torch.dtype, grad: Tensor, weight: Tensor
) -> Tensor | None:
    """Dense, in the memory order of `weight`; None if `kept` is not what the kernels read."""
    if shapes.is_depthwise:
        return _depthwise_gradient(shapes, kept, stored, grad, weight)
    return run_weight_gradient(shapes, kept, BATCH_INNERMOST, stored, grad, weight)


def run_weight_gradient(
    shapes: Shapes, kept: Tensor, layout: str, stored: torch.dtype, grad: Tensor, weight: Tensor
) -> Tensor | None:
    """A weight gradient by a packed activation, in the dtype and memory order of `weight`.

    Args:
        shapes: of the convolution.
        kept: the activation, in the order (channel, y, x, image).
        layout: what the activation calls that order.
        stored: dtype of its values.
        grad: of the result, likewise in memory.
        weight: that it is the gradient of.

    Returns:
        None if `kept` is not what the kernels read.

    Raises:
        MemoryError: no room for its buffers.
    """
    elements = shapes.batch * shapes.channels * shapes.height * shapes.width
    values = fitting.packed_values(kept, elements, stored, layout)
    if values is None or stored not in library.ELEMENTS:
        return None
    out = torch.empty_like(weight, dtype=torch.float32)
    strides = problems.weight_strides(out)
    half = stored is torch.bfloat16
    problem = _weight_problem(shapes, strides, half, torch.get_num_threads())
    failed = library.function("sparse_weight_gradient", ctypes.c_int, elements=grad.dtype)(
        ctypes.byref(problem),
        library.pointer(kept),
        library.size(bits.header_bytes(elements)),
        library.size(values),
        library.pointer(grad),
        library.result(out),
    )
    if not succeeded(failed, "a sparse weight gradient"):
        return None
    return out if weight.dtype is torch.float32 else out.to(weight.dtype)


def _depthwise_gradient(
    shapes: Shapes, kept: Tensor, stored: torch.dtype, grad: Tensor, weight: Tensor
) -> Tensor | None:
    """Of one filter a channel, from the activation as a dense tensor: sums over whole planes, which
    vectors take faster than single values, for as few weights as there are.
    """
    sizes = (shapes.batch, shapes.channels, shapes.height, shapes.width)
    size = sizes if weight.dim() == 4 else (*sizes[:2], shapes.width)
    if order_of(kept) != BATCH_INNERMOST:
        return None
    seen = converted(unpack(kept, size, stored).to(grad.dtype), BATCH_INNERMOST)
    return _sampled_gradient(
        shapes, seen, grad, weight, torch.ones((), dtype=torch.bool, device="cpu")
    )


def _sampled_gradient(
    shapes: Shapes, input: Tensor, grad: Tensor, weight: Tensor, reached: Tensor
) -> Tensor | None:
    """Zero where it does not reach; None if the kernels cannot run it."""
    if shapes.is_strided_pointwise:
        input, shapes = _take_strided(input, shapes), shapes.without_stride()
    # Row-major, as the mask is, whatever the order of the weight.
    strides = problems.row_major_strides(weight)
    problem = _forward_problem(shapes, strides, torch.get_num_threads())
    return run_sampled(problem, reached, input, grad, weight)


def _input_gradient(
    shapes: Shapes, grad: Tensor, weight: Tensor, threshold: float, input_shape: Sequence[int]
) -> Tensor | None:
    """In "batch_innermost"; None if the kernels cannot run it."""
    strides = problems.weight_strides(weight)
    dense = shapes.without_stride() if shapes.is_strided_pointwise else shapes
    size = (dense.height, dense.width)[-(weight.dim() - 2) :]
    out = library.new((*input_shape[:2], *size), BATCH_INNERMOST, grad.dtype)
    for problem in _input_problems(dense, strides, torch.get_num_threads()):
        if not run_problem(problem, grad, weight, None, out, threshold):
            return None
    return out if dense is shapes else _put_strided(out, input_shape, shapes)


@conv_backward.register_kernel("cpu")
def _(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved, call = Saved.split(rest, ConvCall)
    input, kept, weight, weight_state, input_shape, wants = saved
    fits = fitting.are_elements(grad, weight)
    shapes = _shapes(call, input_shape, weight) if fits else None
    spatial = weight.dim() - 2
    if shapes is None or grad.shape != (
        shapes.batch,
        shapes.filters,
        *shapes.out_size[-spatial:],
    ):
        return conv_backward_reference(grad, *rest)
    wants_input, wants_weight, wants_bias = wants
    grads: list[Tensor | None] = [None, None, None]
    grad = converted(grad, call.layout)
    if wants_bias:  # that of the whole gradient, before Top-K
        grads[2] = grad.movedim(0, -1).reshape(weight.shape[0], -1).sum(1)
    if call.sparsifies_gradients:
        grad = converted(call.gradient(grad, spatial), call.layout)
    if wants_input and call.where.backward_weight:
        used, threshold = sparse_weight(weight, weight_state, call.weight_selector)
        grads[0] = _input_gradient(shapes, grad, used, threshold, input_shape)
    if wants_weight and input is None and kept is not None and not call.pad:
        found = _weight_gradient(shapes, kept, call.stored_dtype(grad), grad, weight)
        if found is not None:
            grads[1] = call.weight_gradient(found, weight, weight_state)
    if wants_weight and input is not None and input.dtype is grad.dtype:
        reached = call.reached(weight, weight_state)
        if reached is not None:
            grads[1] = _sampled_gradient(
                shapes, converted(input, call.layout), grad, weight, reached
            )
    left = [wanted and found is None for wanted, found in zip(wants, grads, strict=True)]
    if any(left):
        dense = replace(call, gradient_density="")  # its Top-K is taken already
        others = conv_backward_reference(grad, *saved._replace(wants=left), *dense.options)
        grads = [r if g is None else g for r, g in zip(others, grads, strict=True)]
    first, second, third = (grad.new_empty(0) if g is None else g for g in grads)
    return first, second, third
