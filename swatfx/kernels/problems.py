"""What the C kernels are asked: a convolution's shapes as the structures of csrc/problems.h."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_TAPS = 256


class Tap(ctypes.Structure):
    """One kernel position; `tap` in csrc/problems.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("weight", "dy", "dx")]


_SIZES = (
    "batch channels height width rows out_height out_width grid_height grid_width step_y step_x"
    " step_out_y step_out_x at_y at_x rows_are_filters weight_channel weight_taps groups"
    " weight_group threads taps"
).split()


class Problem(ctypes.Structure):
    """A sum of shifted planes; `conv_problem` in csrc/problems.h."""

    _fields_ = [*((name, ctypes.c_int64) for name in _SIZES), ("tap", Tap * MAX_TAPS)]


@dataclass(frozen=True)
class Shapes:
    """A batched 2d convolution: what forward and both gradients have in common."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple([getattr(self, name) for name in self.__match_args__]))

    def __hash__(self) -> int:
        return self._hash  # a key at every call of a layer, for which ten fields are many

    @staticmethod
    def of(
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Shapes:
        """Shapes of a 1d or 2d convolution; a 1d one is 2d with height 1."""

        def pair(values: Sequence[int], missing: int) -> tuple[int, int]:
            return (missing, values[0]) if len(values) == 1 else (values[0], values[1])

        kernel = pair(weight_shape[2:], 1)
        size = pair(input_shape[2:], 1)
        steps = pair(stride, 1), pair(padding, 0), pair(dilation, 1)
        return Shapes(
            input_shape[0], input_shape[1], *size, weight_shape[0], kernel, *steps, groups
        )

    @functools.cached_property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        sizes = zip(
            (self.height, self.width),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position reads the one input position of its own."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has a filter of its own, and only one."""
        return self.groups == self.channels == self.filters > 1

    @property
    def is_strided_pointwise(self) -> bool:
        """Whether it is pointwise but for a stride: most inputs are then not read at all."""
        return self.kernel == (1, 1) and self.padding == (0, 0) and self.stride != (1, 1)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - as many as fitting.convolution remembers
    def without_stride(self) -> Shapes:
        """A strided pointwise convolution, of the inputs that it reads."""
        height, width = self.out_size
        return replace(self, height=height, width=width, stride=(1, 1))

    def flattened(self) -> Shapes:
        """A pointwise convolution with image and position as one long axis."""
        if not self.is_pointwise:
            return self
        positions = self.batch * self.height * self.width
        lanes = 16 if positions % 16 == 0 else 1
        sizes = (lanes, self.channels, 1, positions // lanes, self.filters)
        return Shapes(*sizes, (1, 1), (1, 1), (0, 0), (1, 1), self.groups)


def _offsets(shapes: Shapes, strides: Sequence[int]) -> list[int]:
    """Of each kernel position within a filter's channel, in elements."""
    _, _, y_step, x_step = strides
    kernel = shapes.kernel
    return [y * y_step + x * x_step for y in range(kernel[0]) for x in range(kernel[1])]


def weight_strides(weight: Tensor) -> tuple[int, ...]:
    """Strides (filter, channel, y, x) of a 1d or 2d weight, or of a linear layer's."""
    if weight.dim() == 2:
        return (*weight.stride(), 1, 1)
    return (weight.unsqueeze(2) if weight.dim() == 3 else weight).stride()


def row_major_strides(weight: Tensor) -> tuple[int, ...]:
    """Likewise, were the weight row-major."""
    return weight_strides(torch.empty(weight.shape, device="meta"))


def _problem(threads: int, taps: list[tuple[int, int, int]], **sizes: int) -> Problem:
    problem = Problem(threads=threads, taps=len(taps), **sizes)
    for i, one in enumerate(taps):
        problem.tap[i] = Tap(*one)
    return problem


def forward_problem(shapes: Shapes, strides: Sequence[int]) -> Problem:
    """The convolution itself."""
    s = shapes.flattened()
    offsets = _offsets(s, strides)
    out_height, out_width = s.out_size
    taps = [
        (
            offsets[y * s.kernel[1] + x],
            y * s.dilation[0] - s.padding[0],
            x * s.dilation[1] - s.padding[1],
        )
        for y in range(s.kernel[0])
        for x in range(s.kernel[1])
    ]
    return _problem(
        torch.get_num_threads(),
        taps,
        batch=s.batch,
        channels=s.channels // s.groups,
        height=s.height,
        width=s.width,
        rows=s.filters // s.groups,
        out_height=out_height,
        out_width=out_width,
        grid_height=out_height,
        grid_width=out_width,
        step_y=s.stride[0],
        step_x=s.stride[1],
        step_out_y=1,
        step_out_x=1,
        at_y=0,
        at_x=0,
        rows_are_filters=1,
        weight_channel=strides[1],
        weight_taps=len(offsets),
        groups=s.groups,
        weight_group=strides[0] * (s.filters // s.groups),
    )


def input_gradient_problems(shapes: Shapes, strides: Sequence[int]) -> Iterator[Problem]:
    """The input gradient: one problem for each phase of the stride."""
    s = shapes.flattened()
    offsets = _offsets(s, strides)
    out_height, out_width = s.out_size
    for at_y in range(min(s.stride[0], s.height)):
        for at_x in range(min(s.stride[1], s.width)):
            taps = [
                (offsets[r * s.kernel[1] + q], y // s.stride[0], x // s.stride[1])
                for r in range(s.kernel[0])
                for q in range(s.kernel[1])
                if (y := at_y + s.padding[0] - r * s.dilation[0]) % s.stride[0] == 0
                and (x := at_x + s.padding[1] - q * s.dilation[1]) % s.stride[1] == 0
            ]
            yield _problem(
                torch.get_num_threads(),
                taps,
                batch=s.batch,
                channels=s.filters // s.groups,
                height=out_height,
                width=out_width,
                rows=s.channels // s.groups,
                out_height=s.height,
                out_width=s.width,
                grid_height=(s.height - at_y + s.stride[0] - 1) // s.stride[0],
                grid_width=(s.width - at_x + s.stride[1] - 1) // s.stride[1],
                step_y=1,
                step_x=1,
                step_out_y=s.stride[0],
                step_out_x=s.stride[1],
                at_y=at_y,
                at_x=at_x,
                rows_are_filters=0,
                weight_channel=strides[1],
                weight_taps=len(offsets),
                groups=s.groups,
                weight_group=strides[0] * (s.filters // s.groups),
            )


class GradientProblem(ctypes.Structure):
    """A weight gradient; `wgrad_problem` in csrc/problems.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "batch channels height width filters out_height out_width kernel_y kernel_x"
            " step_y step_x pad_y pad_x dilation_y dilation_x"
            " weight_filter weight_channel weight_y weight_x groups threads half"
        ).split()
    ]


def weight_gradient_problem(shapes: Shapes, strides: Sequence[int], half: bool) -> GradientProblem:
    """The weight gradient, written with `strides`; `half`: packed values are bfloat16."""
    s = shapes
    height, width = s.height, s.width
    if s.is_pointwise and (positions := s.batch * height * width) % 16 == 0:
        # Image and position are one axis: cut it into rows that suit the caches.
        columns = positions // 16
        width = next(w for w in range(min(16, columns), 0, -1) if columns % w == 0)
        height = columns // width
        s = replace(s, batch=16, height=height, width=width)
    return GradientProblem(
        s.batch,
        s.channels // s.groups,
        height,
        width,
        s.filters // s.groups,
        *s.out_size,
        *s.kernel,
        *s.stride,
        *s.padding,
        *s.dilation,
        *strides,
        s.groups,
        torch.get_num_threads(),
        int(half),
    )
