"""`swatfx::conv` and its backward on CPUs: sparse C kernels in the layout "batch_innermost".

Taken where the op is asked for that layout, in float32, 1d or 2d; anything else is the reference's.
What a sparse kernel cannot gain from (dense weights, a gradient without a packed activation) is
left to torch's dense kernels, part by part.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swatfx import bits, layouts
from swatfx.kernels import library, problems
from swatfx.kernels.problems import Shapes
from swatfx.layouts import BATCH_INNERMOST
from swatfx.ops.conv import (
    active_input,
    conv,
    conv_backward,
    conv_backward_reference,
    conv_reference,
    stored_dtype,
)
from swatfx.ops.layout import converted
from swatfx.ops.where import SWAT, Where, active_weight, reaching_gradient, sparse_gradient

LARGEST_STRIDE = 16
LARGEST_KERNEL = 64
PACKED = (torch.float32, torch.bfloat16)


def runs(weight: Tensor, dtype: torch.dtype, ndim: int, stride: Sequence[int]) -> bool:
    """Whether the C kernels can run a batched convolution of an input of `dtype` and `ndim`."""
    kernel = weight.shape[2:]
    return (
        library.available()
        and weight.dtype is torch.float32
        and dtype is torch.float32
        and ndim == weight.dim() in (3, 4)
        and max(stride) <= LARGEST_STRIDE
        and max(kernel) <= LARGEST_KERNEL
        and kernel.numel() <= problems.MAX_TAPS
    )


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
    """(weight, threshold) whose kept elements are the Top-K weights."""
    if selector == "nchw":
        return _dense_filters(weight), float(state)
    return _dense_filters(active_weight(weight, state, selector, weight.dtype)), 0.0


def _plain(bias: Tensor | None) -> bool:
    return bias is None or bias.dtype is torch.float32


def run_problem(
    problem: problems.Problem,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    threshold: float,
) -> None:
    """Run one sum of shifted planes into `out`; weights below `threshold` do not count.

    Raises:
        MemoryError: no room for its buffers.
    """
    failed = library.function("sparse_conv", ctypes.c_int)(
        ctypes.byref(problem),
        library.pointer(input),
        library.pointer(weight),
        library.pointer(bias),
        library.pointer(out),
        library.real(threshold),
    )
    if failed:
        raise MemoryError("a sparse convolution could not allocate its buffers")


@conv.register_kernel("cpu")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_state: Tensor,
    kept: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int] | None = None,
    pad_mode: str = "constant",
    sparse: str = SWAT,
    weight_selector: str = "nchw",
    activation_state: Tensor | None = None,
    activation_selector: str = "nchw",
    gradient_density: str = "",
    gradient_selector: str = "nchw",
    layout: str = "",
    kept_dtype: torch.dtype | None = None,
) -> Tensor:
    where = Where.parse(sparse)
    fits = layout == BATCH_INNERMOST and runs(weight, input.dtype, input.dim(), stride)
    if not fits or not where.forward_weight or not input.numel() or not _plain(bias):
        return conv_reference(
            input,
            weight,
            bias,
            weight_state,
            kept,
            stride,
            padding,
            dilation,
            groups,
            pad,
            pad_mode,
            sparse,
            weight_selector,
            activation_state,
            activation_selector,
            gradient_density,
            gradient_selector,
            layout,
            kept_dtype,
        )
    if where.forward_activation and activation_state is not None:
        spatial = weight.dim() - 2
        input = active_input(input, activation_state, activation_selector, spatial, pad, pad_mode)
    input = converted(input, layout)
    used, threshold = sparse_weight(weight, weight_state, weight_selector)
    shapes = Shapes.of(input.shape, used, stride, padding, dilation, groups)
    if shapes.is_strided_pointwise:
        input, shapes = _take_strided(input, shapes), shapes.without_stride()
    strides = problems.weight_strides(used)
    problem = _forward_problem(shapes, strides, torch.get_num_threads())
    size = shapes.out_size[-(weight.dim() - 2) :]
    shape = (input.shape[0], weight.shape[0], *size)
    out = layouts.empty(shape, layout, dtype=input.dtype)
    run_problem(problem, input, used, None if bias is None else bias.contiguous(), out, threshold)
    return out


def _strided(name: str, source: Tensor, result: Tensor, shapes: Shapes) -> Tensor:
    library.function(name)(
        library.pointer(source),
        library.pointer(result),
        *map(library.size, (shapes.channels, shapes.height, shapes.width, *shapes.stride)),
        library.size(shapes.batch),
        library.threads(),
    )
    return result


def _take_strided(input: Tensor, shapes: Shapes) -> Tensor:
    """The positions that a pointwise convolution with a stride reads, in "batch_innermost"."""
    height, width = shapes.out_size
    shape = (shapes.batch, shapes.channels, height, width)
    out = layouts.empty(shape, BATCH_INNERMOST, dtype=input.dtype)
    return _strided("take_strided", input, out, shapes)


def _put_strided(grad: Tensor, input_shape: Sequence[int], shapes: Shapes) -> Tensor:
    """The inverse: zero where nothing was read."""
    out = layouts.empty(input_shape, BATCH_INNERMOST, dtype=grad.dtype)
    return _strided("put_strided", grad, out, shapes)


def _weight_gradient(
    shapes: Shapes, kept: Tensor, half: bool, grad: Tensor, weight: Tensor
) -> Tensor:
    """Dense, in the memory order of `weight`."""
    out = torch.empty_like(weight)
    strides = problems.weight_strides(out)
    problem = _weight_problem(shapes, strides, half, torch.get_num_threads())
    elements = shapes.batch * shapes.channels * shapes.height * shapes.width
    failed = library.function("sparse_weight_gradient", ctypes.c_int)(
        ctypes.byref(problem),
        library.pointer(kept),
        library.size(bits.header_bytes(elements)),
        library.pointer(grad),
        library.pointer(out),
    )
    if failed:
        raise MemoryError("a sparse weight gradient could not allocate its buffers")
    return out


@conv_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    input: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    weight_state: Tensor,
    input_shape: Sequence[int],
    layout: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int],
    pad_mode: str,
    sparse: str,
    weight_selector: str,
    gradient_density: str,
    gradient_selector: str,
    wants: Sequence[bool],
    kept_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    where = Where.parse(sparse)
    fits = layout == BATCH_INNERMOST and runs(weight, grad.dtype, grad.dim(), stride)

    def reference(wants: Sequence[bool], grad: Tensor, density: str) -> Any:
        return conv_backward_reference(
            grad,
            input,
            kept,
            weight,
            weight_state,
            input_shape,
            layout,
            stride,
            padding,
            dilation,
            groups,
            pad,
            pad_mode,
            sparse,
            weight_selector,
            density,
            gradient_selector,
            wants,
            kept_dtype,
        )

    if not fits or not grad.numel():
        result: tuple[Tensor, Tensor, Tensor] = reference(wants, grad, gradient_density)
        return result
    wants_input, wants_weight, wants_bias = wants
    empty = grad.new_empty(0)
    grads = [empty, empty.clone(), empty.clone()]
    grad = converted(grad, layout)
    if wants_bias:  # that of the whole gradient, before Top-K
        grads[2] = grad.movedim(0, -1).reshape(weight.shape[0], -1).sum(1)
    if where.gradient and gradient_density:
        sparse_grad = sparse_gradient(grad, gradient_density, gradient_selector, weight.dim() - 2)
        grad = converted(sparse_grad, layout)
    if wants_input and where.backward_weight:
        used, threshold = sparse_weight(weight, weight_state, weight_selector)
        shapes = Shapes.of(input_shape, used, stride, padding, dilation, groups)
        strides = problems.weight_strides(used)
        dense = shapes.without_stride() if shapes.is_strided_pointwise else shapes
        size = (dense.height, dense.width)[-(weight.dim() - 2) :]
        grads[0] = layouts.empty((*input_shape[:2], *size), layout, dtype=grad.dtype)
        for problem in _input_problems(dense, strides, torch.get_num_threads()):
            run_problem(problem, grad, used, None, grads[0], threshold)
        if dense is not shapes:
            grads[0] = _put_strided(grads[0], input_shape, shapes)
    elif wants_input:
        grads[0] = reference((True, False, False), grad, "")[0]
    stored = stored_dtype(grad, kept_dtype)
    if wants_weight and input is None and kept is not None and not pad and stored in PACKED:
        shapes = Shapes.of(input_shape, weight, stride, padding, dilation, groups)
        grads[1] = _weight_gradient(shapes, kept, stored is torch.bfloat16, grad, weight)
        if where.active_only:
            grads[1] = reaching_gradient(grads[1], weight, weight_state, weight_selector)
    elif wants_weight:
        grads[1] = reference((False, True, False), grad, "")[1]
    return grads[0], grads[1], grads[2]
