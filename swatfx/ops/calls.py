"""What a layer op is told besides its tensors: a record an op, whose fields end the op's schema.

An op, its fake, its backward, its compiled kernel and the pass that writes it into a graph all take
the record; the order of its fields is that of the schema, and defaults are the schema's.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from swatfx import selectors
from swatfx.ops import old_masks
from swatfx.ops.where import (
    SWAT,
    Where,
    active_weight,
    as_seen,
    kept_only,
    sparse_gradient,
    weight_keep,
)
from swatfx.selectors import Axes

_SCHEMA_TYPES = {
    "Sequence[int]": "SymInt[]",
    "Sequence[int] | None": "SymInt[]?",
    "int": "SymInt",
    "int | None": "SymInt?",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "str": "str",
    "Tensor | None": "Tensor?",
    "torch.dtype | None": "ScalarType?",
}


_SomeCall = TypeVar("_SomeCall", bound="Call")


class Call:
    """A record whose fields are what an op is told besides its tensors."""

    __match_args__: ClassVar[tuple[str, ...]]  # names of the fields

    @classmethod
    def of(cls: type[_SomeCall], options: Iterable[Any]) -> _SomeCall:
        """`cls(*options)`, at a third of what the constructor of a frozen record takes.

        Fields that no option is given for are the class's own attributes: the defaults.
        """
        made = object.__new__(cls)
        made.__dict__.update(zip(cls.__match_args__, options, strict=False))
        return made

    @property
    def options(self) -> tuple[Any, ...]:
        """The fields in the order of the schema."""
        return tuple([getattr(self, name) for name in self.__match_args__])

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(required fields, those that differ from their defaults): what stands on a node."""
        known = {f.name: f for f in fields(self)}  # type: ignore[arg-type]
        needed = tuple(getattr(self, n) for n, f in known.items() if f.default is MISSING)
        rest = {n: getattr(self, n) for n, f in known.items() if f.default is not MISSING}
        return needed, {n: v for n, v in rest.items() if v != known[n].default}


class SparseCall(Call):
    """What every layer op is told, and what follows from it for its three products."""

    sparse: str
    weight_selector: str
    gradient_density: str
    gradient_selector: str
    kept_dtype: torch.dtype | None
    open: Tensor | None

    @property
    def where(self) -> Where:
        """What is sparse where."""
        return Where.parse(self.sparse)

    def weight_in_forward(self, weight: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that the forward product sees, dense, in `dtype` where that is narrower."""
        return self._seen(self.where.forward_weight, weight, state, dtype)

    def weight_in_backward(self, weight: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that the input gradient sees, likewise."""
        return self._seen(self.where.backward_weight, weight, state, dtype)

    def _seen(self, masked: bool, weight: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
        if masked:
            return active_weight(weight, state, self.weight_selector, dtype)
        return as_seen(weight, dtype)

    def stored_dtype(self, grad: Tensor) -> torch.dtype:
        """Dtype of packed values: the gradient's, or `kept_dtype` if that is narrower."""
        narrow = self.kept_dtype
        return (
            narrow if narrow is not None and narrow.itemsize < grad.dtype.itemsize else grad.dtype
        )

    @property
    def sparsifies_gradients(self) -> bool:
        """Whether both gradients see Top-K of the output gradient (meProp)."""
        return self.where.gradient and bool(self.gradient_density)

    def gradient(self, grad: Tensor, spatial: int) -> Tensor:
        """The output gradient that both products of backward see."""
        if not self.sparsifies_gradients:
            return grad
        return sparse_gradient(grad, self.gradient_density, self.gradient_selector, spatial)

    def reached(self, weight: Tensor, state: Tensor) -> Tensor | None:
        """Mask of the weights that receive a gradient (figure 7), broadcastable; None: all do."""
        if not self.where.active_only or old_masks.is_open(state, weight.numel(), self.open):
            return None
        return weight_keep(weight, state, self.weight_selector)

    def weight_gradient(self, grad: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        """What of a weight gradient reaches the weight."""
        keep = self.reached(weight, state)
        return grad if keep is None else kept_only(grad, keep)


@dataclass(frozen=True)
class ConvCall(SparseCall):
    """What `swatfx::conv` is told.

    Attributes:
        stride: per spatial dimension.
        padding: symmetric zero padding, per spatial dimension.
        dilation: per spatial dimension.
        groups: as in `F.conv2d`.
        pad: what was padded before, in `F.pad` order; backward pads the unpacked activation so.
        pad_mode: mode of `pad`.
        sparse: what is sparse where, see `swatfx.ops.where`.
        weight_selector: name in `swatfx.selectors`.
        activation_state: threshold of the input, where forward sees Top-K activations.
        activation_selector: name in `swatfx.selectors`.
        gradient_density: of the output gradient; "" keeps it dense.
        gradient_selector: name in `swatfx.selectors`.
        layout: of `swatfx.tensors.layouts`; what the result and the input gradient come in. ""
            takes that of the input, and gives what aten gives. (`kept` says itself in which order
            it lies.)
        kept_dtype: of the values in `kept`, where narrower than the gradient's; None: the same.
        open: float64 0-dim, 1 while inactive weights receive their gradient although updates are
            masked (the steps at which RigL grows), else 0; None: they never do.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    pad: Sequence[int] | None = None
    pad_mode: str = "constant"
    sparse: str = SWAT
    weight_selector: str = "nchw"
    activation_state: Tensor | None = None
    activation_selector: str = "nchw"
    gradient_density: str = ""
    gradient_selector: str = "nchw"
    layout: str = ""
    kept_dtype: torch.dtype | None = None
    open: Tensor | None = None


@dataclass(frozen=True)
class LinearCall(SparseCall):
    """What `swatfx::linear` is told: as `ConvCall`, and one more before the last.

    Attributes:
        layout: "", "features_major" or "images_innermost"; what the result comes in, and in
            backward the input gradient. "" and "row_major" give what aten gives.
        sparse_kernels: a wish: run kernels that skip zeros, where there are any for the input.
    """

    sparse: str = SWAT
    weight_selector: str = "nchw"
    activation_state: Tensor | None = None
    activation_selector: str = "nchw"
    gradient_density: str = ""
    gradient_selector: str = "nchw"
    layout: str = ""
    kept_dtype: torch.dtype | None = None
    sparse_kernels: bool = False
    open: Tensor | None = None


@dataclass(frozen=True)
class NormCall(Call):
    """What `swatfx::batch_norm` is told.

    Attributes:
        training: whether batch statistics are used.
        momentum: of the running statistics.
        eps: added to the variance.
        relu: whether ReLU follows.
        saves: "exact", "int8", "int4", or "nothing" where no gradient will be asked for.
    """

    training: bool
    momentum: float
    eps: float
    relu: bool
    saves: str = "exact"


@dataclass(frozen=True)
class NormBackwardCall(Call):
    """What `swatfx::batch_norm_backward` is told.

    Attributes:
        shape: of the norm's input.
        layout: of the norm's input, see `swatfx.tensors.layouts`; the first two gradients lie so.
        training: as forward was told; so are relu and saves.
        relu: likewise.
        has_residual: whether forward added one.
        saves: as forward was told.
    """

    shape: Sequence[int]
    layout: str
    training: bool
    relu: bool
    has_residual: bool
    saves: str


@dataclass(frozen=True)
class RefreshCall(Call):
    """What `swatfx::refresh` is told, and `swatfx::refresh_call` but for two that it knows.

    Attributes:
        period: refresh where iteration mod period is 0.
        selector: name in `swatfx.selectors`.
        layer: for messages and seeds.
        spatial: spatial dimensions of the tensor.
        is_weight: what the tensor is; else an activation.
        seed: of random selectors.
        all_ranks: count over all ranks of the default process group.
        token: of the `History` that remembers what calls used.
        half: whether the layer sees the tensor in float16.
        own: whether the tensor is a parameter, and so in the same storage at every call.
        held: float64 0-dim, 1 where the state stays as it is, else 0; None: it does not.
    """

    period: int
    selector: str
    layer: str
    spatial: int
    is_weight: bool
    seed: int = 0
    all_ranks: bool = False
    token: int = -1
    half: bool = False
    own: bool = False
    held: Tensor | None = None

    @classmethod
    def of_activation(cls, options: Sequence[Any]) -> RefreshCall:
        """From the `options` of `swatfx::refresh_call`, which are all but `OF_ACTIVATION`."""
        given = [*options[:4], False, *options[4:]]
        return cls(*given)

    @property
    def is_batch_shaped(self) -> bool:
        """Whether the state follows the batch's shape, and so is computed in every forward."""
        return not self.is_weight and selectors.get(self.selector).groups != ()

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the selector's state for `x`."""
        axes = Axes.of(x.dim(), self.spatial, self.is_weight)
        return selectors.get(self.selector).state_shape(tuple(x.shape), axes)


@dataclass(frozen=True)
class CurrentCall(Call):
    """What `swatfx::current` is told: as `RefreshCall`.

    Attributes:
        selector: name in `swatfx.selectors`.
        layer: for seeds.
        seed: of random selectors.
        token: of the `Ranked` that remembers the result; without effect on it.
        held: float64 0-dim, 1 where the state stays as it is, else 0; None: it does not.
    """

    selector: str
    layer: str
    seed: int
    token: int
    held: Tensor | None = None


OF_ACTIVATION = ("is_weight", "own", "held")


@dataclass(frozen=True)
class MaxPoolCall(Call):
    """What `swatfx::max_pool2d` is told; its backward, all but `saves`.

    Attributes:
        kernel: two extents, whose product is at most 256.
        stride: two.
        padding: two.
        dilation: two.
        ceil_mode: as in `F.max_pool2d`.
        saves: False where no gradient will be asked for.
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    ceil_mode: bool
    saves: bool = True

    @property
    def for_aten(self) -> tuple[Any, ...]:
        """As aten takes it."""
        pairs = self.kernel, self.stride, self.padding, self.dilation
        return *map(list, pairs), self.ceil_mode


@dataclass(frozen=True)
class AvgPoolCall(Call):
    """What `swatfx::avg_pool2d` and its backward are told: as `F.avg_pool2d`, in pairs."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    ceil_mode: bool
    count_include_pad: bool
    divisor: int | None

    @property
    def for_aten(self) -> tuple[Any, ...]:
        """As aten takes it."""
        return *map(list, self.options[:3]), *self.options[3:]


@dataclass(frozen=True)
class AttentionCall(Call):
    """What attention is told.

    Attributes:
        saves: "exact", or a name of `swatfx.ops.codes.BITS`.
        causal: whether position i sees positions up to i alone.
        scale: what products of query and key are multiplied by; None: 1 / sqrt(their width).
        dropout: probability that a weight is dropped, 0 <= p < 1.
    """

    saves: str
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0

    def scale_of(self, query: Tensor) -> float:
        """`scale`, as a number; `query`: (N, H, L, D)."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale


class Saved(NamedTuple):
    """What a layer's backward gets besides the output's gradient and its call.

    Attributes:
        input: what forward saved, padded, or None.
        kept: likewise, packed; one of the two is given if the weight gradient is wanted.
        weight: as forward got it.
        weight_state: as forward got it.
        input_shape: of the padded input.
        wants: gradients of input, weight and bias.
    """

    input: Tensor | None
    kept: Tensor | None
    weight: Tensor
    weight_state: Tensor
    input_shape: Sequence[int]
    wants: Sequence[bool]

    @staticmethod
    def split(rest: Sequence[Any], call: type[_SomeCall], **named: Any) -> tuple[Saved, _SomeCall]:
        """What follows the gradient in a backward op's arguments, read."""
        count = len(Saved._fields)
        options = rest[count:]
        return Saved(*rest[:count]), call(*options, **named) if named else call.of(options)


# What layer ops of both kinds begin with.
FORWARD = "Tensor input, Tensor weight, Tensor? bias, Tensor weight_state, Tensor? kept"
BACKWARD = (
    "Tensor grad, Tensor? input, Tensor? kept, Tensor weight, Tensor weight_state,"
    " SymInt[] input_shape, bool[] wants"
)


def schema_of(tensors: str, call: type[Call], returns: str, known: Container[str] = ()) -> str:
    """The schema of an op that takes `tensors`, then the fields of `call` that are not `known`."""
    options = []
    for f in fields(call):  # type: ignore[arg-type]
        default = ""
        if f.default is not MISSING:
            default = f'="{f.default}"' if isinstance(f.default, str) else f"={f.default}"
        if f.name not in known:
            options.append(f"{_SCHEMA_TYPES[str(f.type)]} {f.name}{default}")
    return f"({', '.join([tensors, *options])}) -> {returns}"
