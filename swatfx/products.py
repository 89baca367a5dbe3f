"""Which aten ops are products of matrices, how many MACs each takes, and which side is which.

What torch.utils.flop_counter counts, by the same shapes, and what it has no formula for: fused
recurrent layers, attention on CPUs, bilinear layers, products with a vector. Sums of elementwise
products, solvers and decompositions are no products of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Values = Sequence[Tensor | None]


@dataclass(frozen=True)
class Convolution:
    """How a convolution was called, as in aten.convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Term:
    """One product: two sides, and the MACs that it takes; the gradient of either takes as many.

    Attributes:
        macs: of forward, for the whole batch.
        left: tensors that one side comes from; `None` stands for one that autograd wants anyway.
        right: likewise.
        convolution: how it was called, if it is one: `left` is the input, `right` the weight.
    """

    macs: int
    left: Values
    right: Values
    convolution: Convolution | None = None


def terms_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """The products that a call of an aten op forms; empty where it forms none."""
    packet = getattr(func, "overloadpacket", func)
    formula = _FORMULAS.get(packet) or _FOREIGN.get(str(packet))
    if formula is not None:
        return formula(args, kwargs, out)
    if packet in flop_registry:  # somebody else's op: twice the MACs, and we know no sides
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        tensors = [x for x in args if isinstance(x, Tensor)]
        return [Term(flops // 2, tensors[:1], tensors[1:])]
    return []


def is_product(func: Any) -> bool:
    """Whether `terms_of` knows the op."""
    packet = getattr(func, "overloadpacket", func)
    return packet in _FORMULAS or packet in flop_registry or str(packet) in _FOREIGN


def _entries(x: Tensor) -> int:
    """Elements that a product meets: the stored ones of a sparse tensor."""
    return x.numel() if x.layout is torch.strided else int(x._nnz())


def _pair(at: int) -> Callable[..., list[Term]]:
    """A product of the arguments `at` and `at + 1`: matrices, batches of them, or vectors."""

    def terms(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
        given = [*args, *(v for v in kwargs.values() if isinstance(v, Tensor))]
        a, b = given[at], given[at + 1]
        columns = b.shape[-1] if b.dim() > 1 and a.dim() > 1 else 1
        return [Term(_entries(a) * columns, [a], [b])]

    return terms


def _grouped(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """Rows, columns or the inner dimension are cut into groups; offsets say where."""
    a, b = args[:2]
    macs = a.numel() * b.shape[-1]
    return [Term(macs // a.shape[0] if a.dim() == 3 and b.dim() == 2 else macs, [a], [b])]


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    x, w = args[:2]
    stride, padding, dilation = (tuple(args[i]) if len(args) > i else () for i in (3, 4, 5))
    transposed = bool(len(args) > 6 and args[6] is True)
    spatial = w.dim() - 2
    batch = x.shape[0] if x.dim() == w.dim() else 1
    places = (x if transposed else out).shape[-spatial:]
    sizes = [v * spatial if len(v) == 1 else v for v in (stride, padding, dilation)]
    how = Convolution(sizes[0], sizes[1], sizes[2], transposed)
    return [Term(w.numel() * batch * math.prod(places), [x], [w], how)]


def _slow_convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    x, w = args[:2]
    return [Term(w.numel() * out.shape[0] * math.prod(out.shape[2:]), [x], [w])]


def _time_first(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """`conv_tbc`: (time, batch, filters) from a weight (taps, channels, filters)."""
    return [Term(args[1].numel() * out.shape[0] * out.shape[1], [args[0]], [args[1]])]


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """Scores of all queries with all keys, masked or not, and their sums of values."""
    q, k, v = args[:3]
    scores = q.numel() // q.shape[-1] * k.shape[-2] if q.shape[-1] else 0
    return [Term(scores * q.shape[-1], [q], [k]), Term(scores * v.shape[-1], [q, k], [v])]


def _trilinear(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """`nn.Bilinear`: y[n, o] = sum over i, j of a[n, i] w[o, i, j] b[n, j]."""
    a, w, b = args[:3]
    rows = max(a.numel() // max(w.shape[-2], 1), 1) if a.dim() else 1
    first = rows * w.numel()
    return [Term(first, [a], [w]), Term(first // max(w.shape[-2], 1), [a, w], [b])]


def _bag(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """An embedding bag multiplies where its samples have weights."""
    weight, indices = args[:2]
    given = kwargs.get("per_sample_weights", args[6] if len(args) > 6 else None)
    return [] if given is None else [Term(indices.numel() * weight.shape[-1], [given], [weight])]


def _distance(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """Euclidean distances by a product of matrices, two columns wider."""
    a, b = args[:2]
    return [Term(a.numel() // max(a.shape[-1], 1) * b.shape[-2] * (a.shape[-1] + 2), [a], [b])]


def _recurrent(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """One layer and direction of an LSTM, in oneDNN: (time, batch, features)."""
    x, of_input, of_hidden = args[:3]
    time, batch = x.shape[:2]
    each = batch * of_hidden.numel()
    return [
        Term(time * batch * of_input.numel(), [x], [of_input]),
        Term(each, [args[5]], [of_hidden]),
        Term(each * (time - 1), [None], [of_hidden]),
    ]


def _recurrent_gpu(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """All layers and directions of a recurrent network, in cuDNN."""
    x = args[0]
    matrices = [w for w in args[1] if w.dim() > 1]
    steps = x.shape[0] * x.shape[1]
    # Of the first layer's input, a gradient may not be wanted; later layers' inputs always are.
    return [Term(steps * w.numel(), [x if i == 0 else None], [w]) for i, w in enumerate(matrices)]


_BY_NAME: dict[Callable[..., list[Term]], str] = {
    _pair(0): "mm bmm mv dot vdot _int_mm _scaled_mm",
    _pair(1): "addmm baddbmm addbmm addmv _addmm_activation _sparse_addmm",
    _grouped: "_grouped_mm _scaled_grouped_mm",
    _convolution: "convolution _convolution convolution_overrideable",
    _slow_convolution: "_slow_conv2d_forward cudnn_convolution",
    _time_first: "conv_tbc",
    _attention: (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
        " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
        " _scaled_dot_product_fused_attention_overrideable"
        " _scaled_dot_product_attention_math_for_mps"
    ),
    _trilinear: "_trilinear",
    _bag: "_embedding_bag _embedding_bag_forward_only",
    _distance: "_euclidean_dist",
    _recurrent: "mkldnn_rnn_layer",
    _recurrent_gpu: "_cudnn_rnn miopen_rnn",
}


def _known() -> dict[Any, Callable[..., list[Term]]]:
    found: dict[Any, Callable[..., list[Term]]] = {}
    for formula, names in _BY_NAME.items():
        for name in names.split():
            packet = getattr(aten, name, None)  # some builds of torch lack some
            if packet is not None:
                found[packet] = formula
    return found


_FORMULAS = _known()
_FOREIGN = {"torchvision.deform_conv2d": _slow_convolution}  # by name: it need not be loaded
_NORMS = {
    packet
    for name in (
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"
        " _batch_norm_with_update _batch_norm_no_update cudnn_batch_norm miopen_batch_norm"
        " batch_norm_elemt"
    ).split()
    if (packet := getattr(aten, name, None)) is not None
}


def is_batch_norm(func: Any) -> bool:
    """Whether an aten op normalises its first argument over a batch."""
    return getattr(func, "overloadpacket", None) in _NORMS
