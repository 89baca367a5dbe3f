"""Random networks: a case is a list of operations on earlier values, with a method and options."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.fuzz.cases import difference
from tests.fuzz.methods import Method
from tests.fuzz.tensors import ORDERS

Shape = tuple[int, ...]
# What is a view, or the tensor itself, or a copy, as the memory order of a tensor has it.
SHARED: tuple[Callable[[Any], Any], ...] = (
    lambda x: x.contiguous(),
    lambda x: x.reshape(-1),
    lambda x: x.flatten(),
    lambda x: x.ravel(),
    lambda x: x.flatten(0, 1),
    lambda x: x.reshape(x.size(0) * x.size(1), -1),
    lambda x: x.view(-1),
    lambda x: x.view(x.size(0) * x.size(1), -1),
    lambda x: x.transpose(0, -1).contiguous(),
)


@dataclass(frozen=True)
class Do:
    """One operation.

    Attributes:
        name: in `assembling.APPLY`.
        sources: numbers of earlier values; 0 is the network's input.
        options: numbers that it takes: sizes of a new layer, or the number of the operation whose
            layer "again" calls.
        body: of a part: its operations, on values of its own.
    """

    name: str
    sources: tuple[int, ...]
    options: tuple[int, ...] = ()
    body: tuple[Do, ...] = ()

    @staticmethod
    def from_json(data: dict[str, Any]) -> Do:
        body = tuple(Do.from_json(d) for d in data["body"])
        return Do(data["name"], tuple(data["sources"]), tuple(data["options"]), body)


@dataclass(frozen=True)
class NetworkCase:
    """A network, its input, and what is done with it.

    Attributes:
        seed: of parameters and inputs.
        shape: of the input, N first.
        order: its memory order.
        ops: what is done; operation i makes value i + 1. All that nothing reads are outputs.
        method: the policy.
        norm_saves: as in `swatfx.compile`, as are kernels and value_dtype.
        kernels: see there.
        value_dtype: see there.
        steps: "train" and "eval", in order.
        threads: torch's.
    """

    seed: int = 0
    shape: Shape = (2, 3, 8, 8)
    order: str = "contiguous"
    ops: tuple[Do, ...] = ()
    method: Method = Method(first_dense=True)
    norm_saves: str = "exact"
    kernels: str = "auto"
    value_dtype: str | None = None
    steps: tuple[str, ...] = ("train",)
    threads: int = 1

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> NetworkCase:
        """Read what `to_json` wrote."""
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        plain["ops"] = tuple(Do.from_json(d) for d in data["ops"])
        return NetworkCase(**{**plain, "method": Method(**data["method"])})

    def __str__(self) -> str:
        return difference(self, NetworkCase())


class _Drawing:
    """Operations as they are drawn, with the shapes of their values."""

    def __init__(self, rng: random.Random, shape: Shape) -> None:
        self.rng = rng
        self.ops: list[Do] = []
        self.shapes: list[Shape] = [shape]

    def add(self, name: str, sources: tuple[int, ...], options: tuple[int, ...], shape: Shape,
            body: tuple[Do, ...] = ()) -> int:  # fmt: skip
        self.ops.append(Do(name, sources, options, body))
        self.shapes.append(shape)
        return len(self.ops)

    def same(self, name: str, x: int, *options: int) -> int:
        """An operation that keeps the shape."""
        shape = self.shapes[x]
        if name == "bn":
            options = (len(shape), shape[1])
        elif name in ("layernorm", "groupnorm"):
            options = (shape[-1],) if name == "layernorm" else (4, shape[1])
        return self.add(name, (x,), options, shape)

    def conv(self, x: int, filters: int, k: int, stride: int = 1, groups: int = 1) -> int:
        rng, shape = self.rng, self.shapes[x]
        dilation = rng.choice((1, 1, 1, 2)) if k > 1 else 1
        pad = dilation * (k // 2) if rng.random() < 0.85 else rng.choice((0, 1))
        size = tuple((n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n in shape[2:])
        if min(size) < 1:
            return self.conv(x, filters, 1, 1, groups)
        bias = int(rng.random() < 0.5)
        options = (len(size), shape[1], filters, k, stride, pad, dilation, groups, bias)
        return self.add("conv", (x,), options, (shape[0], filters, *size))

    def linear(self, x: int, features: int) -> int:
        shape = self.shapes[x]
        options = (shape[-1], features, int(self.rng.random() < 0.7))
        return self.add("linear", (x,), options, (*shape[:-1], features))

    def activation(self, x: int) -> int:
        names = ("relu", "relu_", "relu_", "hardswish_", "gelu", "silu_", "leaky_", "hardtanh_")
        return self.same(self.rng.choice(names), x)

    def width(self) -> int:
        return self.rng.choice((8, 8, 12, 16, 16, 16, 24, 32))


def random_network(seed: int, number: int) -> NetworkCase:
    """Case `number` of a run: the same whatever else is run."""
    rng = random.Random(f"network/{seed}/{number}")
    batch = rng.choices((1, 2, 5, 15, 16, 17, 32, 33), (5, 12, 8, 8, 40, 8, 12, 7))[0]
    what = rng.choices(("image", "line", "tokens", "rows"), (60, 12, 18, 10))[0]
    shape: Shape = (batch, rng.choice((1, 3, 8)), *[rng.choice((5, 6, 8, 8, 9)) for _ in "hw"])
    if what == "line":
        shape = (batch, rng.choice((1, 4, 8)), rng.choice((8, 13, 20)))
    elif what == "tokens":
        shape = (batch, rng.choice((3, 6, 10)), rng.choice((8, 16)))
    elif what == "rows":
        shape = (batch, rng.choice((7, 16, 33)))
    d = _Drawing(rng, shape)
    images = what in ("image", "line")
    x = d.conv(0, d.width(), rng.choice((1, 3, 3))) if images else d.linear(0, d.width())
    for _ in range(rng.randint(2, 6)):
        x = _block(d, x)
        if math.prod(d.shapes[x]) > 40000 or len(d.ops) > 26 or len(d.shapes[x]) == 1:
            break
    if rng.random() < 0.7:
        x = _head(d, x)
    parts = any(op.body for op in d.ops)
    return NetworkCase(
        seed=rng.randrange(1 << 30),
        shape=shape,
        # In other orders, plain formulas may share memory where eager code does not.
        order=rng.choice(ORDERS[:-1])
        if rng.random() < 0.3 and not any(op.name == "shared" for op in d.ops)
        else "contiguous",
        ops=tuple(d.ops),
        method=_method(rng, parts),
        norm_saves="int8" if rng.random() < 0.2 else "exact",
        kernels=rng.choices(("sparse", "auto", "dense"), (60, 25, 15))[0],
        value_dtype="bf16" if rng.random() < 0.15 else None,
        steps=rng.choice((("train",), ("train",), ("train", "eval"), ("train", "train", "eval"),
                          ("train", "train"), ("train", "eval", "train"))),
        threads=rng.choices((1, 2, 3), (75, 15, 10))[0],
    )  # fmt: skip


def _method(rng: random.Random, parts: bool) -> Method:
    names = ("swat-u",) * 12 + ("swat-erk", "saw", "forward-weights", "forward-activations")
    selectors = (
        "chw",
        "hw",
        "channel",
        "channel-per-filter",
        "filter",
        "input-channel",
        "random",
        "block-4x1",
        "block-1x4",
    )
    activations = ("chw", "hw") if parts else ("chw", "hw", "random")
    return Method(
        rng.choice((*names, "swat-active-update", "static", "static")),
        rng.choice((0.0, 0.5, 0.7, 0.8, 0.9, 0.9, 0.95)),
        rng.choice((None, None, None, 0.0, 0.6)),
        rng.choice(selectors) if rng.random() < 0.3 else "nchw",
        rng.choice(activations) if rng.random() < 0.25 else "nchw",
        period=rng.choice((1, 1, 1, 2, 3)),
        first_dense=rng.random() < 0.6,
    )


def _block(d: _Drawing, x: int) -> int:
    shape = d.shapes[x]
    if len(shape) >= 3 and d.rng.random() < 0.15:
        return _part(d, x)
    if len(shape) == 4 or (len(shape) == 3 and _is_line(d, x)):
        return _image_block(d, x)
    return _rows_block(d, x)


def _is_line(d: _Drawing, x: int) -> bool:
    """Whether a value of three dimensions is (N, C, L), and not (N, L, C)."""
    while x:
        op = d.ops[x - 1]
        if op.name in ("conv", "bn", "maxpool", "avgpool"):
            return True
        if op.name in ("linear", "layernorm", "tokens", "attention", "first"):
            return False
        x = op.sources[0]
    return False


def _image_block(d: _Drawing, x: int) -> int:
    rng, shape = d.rng, d.shapes[x]
    kind = rng.choice(("plain", "plain", "residual", "residual", "preact", "pool", "squeeze",
                       "branches", "inverted", "shuffle", "tokens", "up", "group", "twice",
                       "transposed", "gated", "shared"))  # fmt: skip
    if kind in ("plain", "preact"):
        if kind == "preact":
            x = d.activation(d.same("bn", x))
        stride = rng.choice((1, 1, 2))
        x = d.conv(x, d.width(), rng.choice((1, 3, 3, 5)), stride)
        if rng.random() < 0.7:
            x = d.same("bn", x)
        return d.activation(x)
    if kind == "residual":
        y = d.same("bn", d.conv(x, d.width(), 3, 1))
        y = d.same(rng.choice(("relu", "relu_")), y)
        y = d.same("bn", d.conv(y, d.shapes[y][1], 1))
        if d.shapes[y] != d.shapes[x]:
            if d.shapes[y][2:] != d.shapes[x][2:]:
                return y
            x = d.conv(x, d.shapes[y][1], 1)
            if d.shapes[y] != d.shapes[x]:
                return d.add("sum", (y, x), (), (shape[0],))
        z = d.add(rng.choice(("add", "add", "add_")), (y, x), (), d.shapes[y])
        return d.same(rng.choice(("relu", "relu_")), z)
    if kind == "pool" and min(shape[2:]) >= 3:
        name = rng.choice(("maxpool", "maxpool", "avgpool"))
        k, stride, pad = rng.choice(((2, 2, 0), (3, 2, 1), (3, 1, 1)))
        size = tuple((n + 2 * pad - k) // stride + 1 for n in shape[2:])
        return d.add(name, (x,), (k, stride, pad), (*shape[:2], *size))
    if kind == "squeeze":
        ones = (1,) * (len(shape) - 2)
        y = d.add("gap", (x,), (), (*shape[:2], *ones))
        y = d.same(rng.choice(("relu_", "silu_")), d.conv(y, 8, 1))
        y = d.conv(y, shape[1], 1)
        if d.shapes[y][2:] != ones:
            return d.add("sum", (y, x), (), (shape[0],))
        return d.add("gate", (x, y), (), shape)
    if kind == "branches":
        y, z = d.conv(x, d.width(), 1), d.conv(x, d.width(), 1)
        if d.shapes[y][2:] != d.shapes[z][2:]:
            return d.add("sum", (y, z), (), (shape[0],))
        both = d.add(
            "cat", (y, z), (), (shape[0], d.shapes[y][1] + d.shapes[z][1], *d.shapes[y][2:])
        )
        return d.activation(d.same("bn", both) if rng.random() < 0.5 else both)
    if kind == "inverted":
        y = d.activation(d.same("bn", d.conv(x, 2 * shape[1], 1)))
        wide = d.shapes[y][1]
        y = d.activation(d.same("bn", d.conv(y, wide, 3, rng.choice((1, 2)), wide)))
        return d.same("bn", d.conv(y, d.width(), 1))
    if kind == "shuffle" and shape[1] % 2 == 0:
        y = d.same("shuffle", x)
        return d.conv(y, 16, 3, 1, 2)
    if kind == "tokens" and len(shape) == 4:
        return d.add("tokens", (x,), (), (shape[0], math.prod(shape[2:]), shape[1]))
    if kind == "up" and len(shape) == 4 and math.prod(shape) < 6000:
        return d.conv(d.add("up", (x,), (), (*shape[:2], *(2 * n for n in shape[2:]))), 8, 3)
    if kind == "group" and shape[1] % 4 == 0:
        return d.activation(d.same("groupnorm", x))
    if kind == "twice":
        y = d.conv(x, shape[1], 1)
        if d.shapes[y] == shape:
            y = d.add("again", (d.activation(y),), (y - 1,), shape)
        return y
    if kind == "shared":
        y = d.same("shared", d.conv(x, d.width(), 3), rng.randrange(len(SHARED)), rng.randint(0, 1))
        return d.conv(y, d.width(), 1) if rng.random() < 0.5 else y
    if kind == "gated":
        return _gated(d, x, lambda x, width: d.conv(x, width, 1))
    if kind == "transposed" and math.prod(shape) < 6000 and len(shape) == 4:
        size = tuple(2 * n for n in shape[2:])
        return d.add("upconv", (x,), (shape[1], 8), (shape[0], 8, *size))
    return d.same("dropout", x)


def _rows_block(d: _Drawing, x: int) -> int:
    rng, shape = d.rng, d.shapes[x]
    kind = rng.choice(
        (
            "mlp",
            "mlp",
            "plain",
            "norm",
            "attention",
            "attention",
            "first",
            "twice",
            "image",
            "gated",
        )
    )
    if kind == "gated":
        return _gated(d, x, d.linear)
    if kind == "mlp":
        y = d.same("layernorm", x) if rng.random() < 0.6 else x
        y = d.linear(d.activation(d.linear(y, 2 * shape[-1])), shape[-1])
        return d.add("add", (x, y), (), shape)
    if kind == "norm" and len(shape) == 2:
        return d.activation(d.same("bn", d.linear(x, d.width())))
    if kind == "attention" and len(shape) == 3 and shape[-1] % 4 == 0:
        y = d.same(
            "attention", d.same("layernorm", x), shape[-1], rng.choice((2, 4)), rng.choice((0, 1))
        )
        return d.add("add", (x, y), (), shape)
    if kind == "first" and len(shape) == 3:
        return d.add("first", (x,), (), (shape[1], shape[0], shape[2]))
    if kind == "twice":
        y = d.linear(x, shape[-1])
        return d.add("again", (d.activation(y),), (y - 1,), shape)
    if kind == "image" and len(shape) == 3:
        return d.conv(d.add("swap", (x,), (), (shape[0], shape[2], shape[1])), d.width(), 1)
    return d.activation(d.linear(x, d.width()))


def _gated(d: _Drawing, x: int, layer: Callable[[int, int], int]) -> int:
    """Two layers that read one tensor, both called twice."""
    width = d.shapes[x][1 if len(d.shapes[x]) == 4 or _is_line(d, x) else -1]
    first = [layer(x, width), layer(x, width)]
    if d.shapes[first[0]] != d.shapes[x] or d.shapes[first[1]] != d.shapes[x]:
        return first[1]  # padded
    y = d.add("gate", (first[0], first[1]), (), d.shapes[x])
    again = [d.add("again", (y,), (n - 1,), d.shapes[x]) for n in first]
    return d.add("gate", (again[0], again[1]), (), d.shapes[x])


def _part(d: _Drawing, x: int, images: bool | None = None) -> int:
    """A module that is checkpointed, or that tracing cannot follow; called once or twice.

    It may begin with another one; `images` says of such a one what its values are.
    """
    rng, shape = d.rng, d.shapes[x]
    inner = _Drawing(rng, shape)
    is_outer = images is None
    if images is None:
        images = len(shape) == 4 or _is_line(d, x)
    y = _part(inner, 0, images) if is_outer and rng.random() < 0.3 else 0
    for _ in range(rng.randint(1, 2)):
        if images:
            k = rng.choice((1, 3))
            options = (len(shape) - 2, shape[1], shape[1], k, 1, k // 2, 1, 1, rng.randint(0, 1))
            y = inner.add("conv", (y,), options, shape)
        else:
            y = inner.linear(y, shape[-1])
        y = inner.same(rng.choice(("relu", "relu_", "gelu")), y)
    name = rng.choice(("eager", "checkpoint", "checkpoint_reentrant", "eager_checkpoint"))
    return d.add(name, (x,), (rng.choice((1, 2)),), shape, tuple(inner.ops))


def _head(d: _Drawing, x: int) -> int:
    rng, shape = d.rng, d.shapes[x]
    if len(shape) == 1:
        return x
    if len(shape) > 2:
        wide = math.prod(shape[1:])
        if wide <= 400 and rng.random() < 0.4:
            x = d.add("flatten", (x,), (), (shape[0], wide))
        elif len(shape) == 3 and not _is_line(d, x):
            x = d.add("mean", (x,), (1,), (shape[0], shape[2]))
        else:
            x = d.add("mean", (x,), tuple(range(2, len(shape))), shape[:2])
    if rng.random() < 0.3:
        x = d.same("dropout", x)
    return d.linear(x, rng.choice((1, 5, 10)))


def simplified(case: NetworkCase, ops: tuple[Do, ...]) -> NetworkCase:
    """`case` with other operations."""
    return replace(case, ops=ops)
