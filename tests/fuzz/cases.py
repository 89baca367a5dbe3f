"""Random layers: a case is a small frozen value that JSON can hold, drawn from (seed, number)."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, fields, replace
from typing import Any

from tests.fuzz.methods import METHODS, Method
from tests.fuzz.tensors import ORDERS

AFTER = ("", "relu_", "hardswish_", "add_", "mul_", "clamp_")
STEPS = ("train", "train", "train", "eval", "forward")


@dataclass(frozen=True)
class LayerCase:
    """One layer, its input, its method, and what is done with it.

    Attributes:
        seed: of weights and inputs.
        kind: "linear", or "conv1d" and so on.
        transposed: a transposed convolution, which stays dense, behind a sparse stem.
        functional: F.conv2d and the like on a parameter, not a module.
        batch: N, or None for an input without that dimension.
        inputs: channels of the input.
        outputs: channels of the output.
        size: spatial sizes of the input; of a linear layer, the dimensions between N and C.
        kernel: and so on: as in nn.Conv2d.
        order: memory order of the input, in `tensors.ORDERS`.
        inside: the model itself makes that order.
        grad_order: of the output gradient.
        stem: a pointwise layer of the same kind comes before.
        before: a ReLU comes before.
        after: what is done to the output in place.
        calls: "once"; "twice" on different inputs; "same", twice on one input; "shared", by two
            layers with one weight.
        method: the policy.
        steps: what is done, in order: "train", "forward" (training without gradient), "eval".
        batches: N of each step, where it is not `batch`.
        kernels: as in `swatfx.compile`.
        value_dtype: "bf16", or None.
        dtype: "float32", "float64", or "autocast".
        threads: torch's.
        grid: whole numbers, so that all sums are exact.
        frozen: which of "weight", "bias", "input" need no gradient.
        misfit: channels that the input has too many: eager raises.
    """

    seed: int = 0
    kind: str = "linear"
    transposed: bool = False
    functional: bool = False
    batch: int | None = 2
    inputs: int = 8
    outputs: int = 8
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    pad_mode: str = "zeros"
    bias: bool = True
    order: str = "contiguous"
    inside: bool = False
    grad_order: str = "contiguous"
    stem: bool = False
    before: bool = False
    after: str = ""
    calls: str = "once"
    method: Method = Method()
    steps: tuple[str, ...] = ("train",)
    batches: tuple[int, ...] = ()
    kernels: str = "auto"
    value_dtype: str | None = None
    dtype: str = "float32"
    threads: int = 1
    grid: bool = False
    frozen: tuple[str, ...] = ()
    misfit: int = 0

    @property
    def spatial(self) -> int:
        """Dimensions of the kernel."""
        return 0 if self.kind == "linear" else int(self.kind[4])

    def input_shape(self, step: int) -> tuple[int, ...]:
        """Of a step's input."""
        batch = self.batch
        if batch is not None and step < len(self.batches):
            batch = self.batches[step]
        first = () if batch is None else (batch,)
        channels = self.inputs + self.misfit
        return (*first, channels, *self.size) if self.spatial else (*first, *self.size, channels)

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> LayerCase:
        """Read what `to_json` wrote, also after JSON made lists of tuples."""
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return LayerCase(**{**plain, "method": Method(**data["method"])})

    def __str__(self) -> str:
        return difference(self, LayerCase())


def difference(case: Any, base: Any) -> str:
    """Source of a dataclass, but for fields that `base` has alike."""
    parts = []
    for f in fields(case):
        value = getattr(case, f.name)
        if value != getattr(base, f.name):
            nested = dataclasses.is_dataclass(value)
            parts.append(f"{f.name}={difference(value, Method()) if nested else repr(value)}")
    return f"{type(case).__name__}({', '.join(parts)})"


def random_layer(seed: int, number: int) -> LayerCase:
    """Case `number` of a run: the same whatever else is run."""
    rng = random.Random(f"layer/{seed}/{number}")
    spatial = rng.choices((0, 1, 2, 3), (25, 28, 37, 10))[0]
    case = LayerCase(
        seed=rng.randrange(1 << 30),
        kind=f"conv{spatial}d" if spatial else "linear",
        functional=rng.random() < 0.25,
        batch=rng.choices(
            (None, 0, 1, 3, 15, 16, 17, 31, 32, 33), (5, 3, 12, 8, 8, 28, 8, 8, 12, 8)
        )[0],
        bias=rng.random() < 0.7,
        kernels=rng.choices(("sparse", "auto", "dense"), (55, 25, 20))[0],
        threads=rng.choices((1, 2, 3), (70, 20, 10))[0],
        order=rng.choice(ORDERS) if rng.random() < 0.6 else "contiguous",
        inside=rng.random() < 0.5,
        grad_order=rng.choice(ORDERS) if rng.random() < 0.3 else "contiguous",
        stem=rng.random() < 0.3,
        before=rng.random() < 0.3,
        after=rng.choice(AFTER) if rng.random() < 0.5 else "",
        calls=rng.choices(("once", "twice", "same", "shared"), (76, 12, 6, 6))[0],
        dtype=rng.choices(("float32", "float64", "autocast"), (70, 6, 24))[0],
        value_dtype="bf16" if rng.random() < 0.12 else None,
        grid=rng.random() < 0.5,
        frozen=tuple(n for n in ("weight", "bias", "input") if rng.random() < 0.05),
        misfit=rng.choices((0, 1, 16), (98, 1, 1))[0],
    )
    case = _sized(case, rng) if spatial else _rows(case, rng)
    case = replace(case, method=_method(case, rng), **_timed(case, rng))
    if ":4" in case.method.weight_selector:  # which of two equal weights stays is nobody's word
        case = replace(case, grid=False)
    if case.inside:  # the shape is part of the traced model
        case = replace(case, batches=())
    if case.dtype == "autocast":  # roundings of several layers have no simple bound
        after = case.after if case.after in ("", "relu_") else ""
        # A bias is added to what is rounded already: near zero the sign is anybody's.
        case = replace(case, stem=False, after=after, bias=case.bias and not after)
        if spatial == 3:  # torch's own bfloat16 gradients read memory that nobody wrote
            case = replace(case, dtype="float32")
    if case.method.name == "meprop":  # ranks gradients, which have to be what the oracle's are
        after = "" if case.after == "hardswish_" else case.after
        case = replace(case, after=after, stem=case.stem and case.grid)
    if case.dtype == "autocast" and case.method.name == "forward-activations":
        case = replace(case, dtype="float32")  # the forward ranks what is rounded: ties are others
    if spatial and case.dtype != "autocast" and rng.random() < 0.05:
        case = replace(case, transposed=True, stem=True, padding=case.padding or 0, groups=1)
        if isinstance(case.padding, str) or case.pad_mode != "zeros":
            case = replace(case, padding=(0,) * spatial, pad_mode="zeros")
    return case


def _width(rng: random.Random) -> int:
    return rng.choice((1, 2, 3, 5, 8, 15, 16, 16, 17, 24, 31, 32, 33, 40, 64))


def _rows(case: LayerCase, rng: random.Random) -> LayerCase:
    middle = rng.choices((0, 1, 2, 3), (55, 30, 10, 5))[0]
    size = tuple(
        rng.choice((1, 2, 3, 5, 7, 16, 17)[: 7 if middle == 1 else 4]) for _ in range(middle)
    )
    inputs = _width(rng) if rng.random() < 0.8 else rng.choice((128, 130, 257, 530))
    outputs = _width(rng) if rng.random() < 0.85 else rng.choice((100, 129, 256))
    return replace(case, inputs=inputs, outputs=outputs, size=size)


def _sized(case: LayerCase, rng: random.Random) -> LayerCase:
    """A convolution of at most some millions of products."""
    spatial = case.spatial
    while True:
        groups = rng.choices((1, 2, 3, 4, 8), (70, 12, 6, 6, 6))[0]
        inputs, outputs = _width(rng) * groups, _width(rng) * groups
        if rng.random() < 0.14:  # depthwise, with a multiplier
            groups = inputs = _width(rng)
            outputs = groups * rng.choice((1, 1, 2))
        if rng.random() < 0.04:
            groups, inputs = 1, rng.choice((140, 260, 530))
        size = tuple(rng.choice((1, 2, 3, 4, 5, 7, 8, 9, 13, 19, 33)) for _ in range(spatial))
        kernel = tuple(rng.choice((1, 1, 2, 3, 3, 3, 4, 5, 7)) for _ in range(spatial))
        if rng.random() < 0.4:
            kernel = (rng.choice((1, 1, 3, 3, 2, 5)),) * spatial
        taps, places = math.prod(kernel), math.prod(size)
        macs = max(case.batch or 1, 1) * places * taps * inputs * outputs // groups
        if macs < 3e6 and max(case.batch or 1, 1) * places * max(inputs, outputs) < 6e4:
            break
    even = rng.random() < 0.5
    stride = tuple(rng.choice((1, 1, 2, 2, 3, 5)) for _ in range(spatial))
    padding: tuple[int, ...] | str = tuple(rng.choice((0, 0, 1, 1, 2, 3)) for _ in range(spatial))
    dilation = tuple(rng.choice((1, 1, 1, 2, 3)) for _ in range(spatial))
    if even:
        stride, padding = stride[:1] * spatial, tuple(k // 2 for k in kernel)
        dilation = (1,) * spatial
    if rng.random() < 0.12:
        padding, stride = rng.choice(("same", "valid", "same")), (1,) * spatial
    mode = "zeros"
    if rng.random() < 0.12:
        mode = rng.choice(("reflect", "circular", "replicate"))
    return replace(
        case,
        inputs=inputs,
        outputs=outputs,
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        pad_mode=mode,
        functional=case.functional and mode == "zeros",
    )


def _method(case: LayerCase, rng: random.Random) -> Method:
    name = rng.choice(METHODS) if rng.random() < 0.45 else "swat-u"
    sparsity = rng.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.9, 0.95, 0.99))
    if rng.random() < 0.2:
        sparsity = round(rng.random() * 0.99, 3)
    weights = ["chw", "hw", "channel", "channel-per-filter", "filter", "input-channel", "random"]
    weights += ["2:4", "1:4", "ssc", "block-4x1", "block-2x3"]
    selector = rng.choice(weights) if rng.random() < 0.5 else "nchw"
    if selector == "ssc":
        selector = f"ssc:g{rng.choice((1, 2, 3, 4))}:p{rng.choice((1, 2, 4, 8))}"
        if any(k % 2 == 0 for k in case.kernel):
            selector = "nchw"
    if selector in ("2:4", "1:4"):
        sparsity = {"2:4": 0.5, "1:4": 0.75}[selector]
        if name in ("swat-erk", "meprop"):
            selector = "nchw"
    others = ("chw", "hw", "random")
    held = rng.random() < 0.06 and name not in ("dst", "static", "meprop") and not case.grid
    return Method(
        name,
        sparsity,
        rng.choice((None, None, None, 0.0, 0.5, 0.9)),
        selector,
        rng.choice(others) if rng.random() < 0.35 else "nchw",
        rng.choice(("nchw", "chw", "hw")),
        period=rng.choice((1, 1, 1, 2, 3)),
        held=held,
    )


def _timed(case: LayerCase, rng: random.Random) -> dict[str, Any]:
    steps = ["train"]
    while rng.random() < 0.35 and len(steps) < 4:
        steps.append(rng.choice(STEPS))
    batches: tuple[int, ...] = ()
    if case.batch is not None and len(steps) > 1 and rng.random() < 0.3:
        batches = tuple(rng.choice((1, 15, 16, 17, 32)) for _ in steps)
        if (case.batch or 1) < 16:
            batches = tuple(min(b, 3) for b in batches)
    return {"steps": tuple(steps), "batches": batches}
