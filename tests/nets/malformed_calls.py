"""Calls every op that has a compiled kernel with sizes, strides, lengths and types that do not fit.

Run as a script, in a process of its own: a kernel that trusts them reads or writes foreign memory.
Each call is made twice, on the kernels and on the plain-torch form: either both raise, or both
return the same. Writes the call at hand to stderr, so that whoever watches knows which one died,
and prints how many were made.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from swatfx import kernels
from swatfx.tensors import layouts
from swatfx.tensors.layouts import BATCH_INNERMOST, CHANNELS_LAST, ROW_MAJOR

OPS = torch.ops.swatfx
INTEGERS = (-1, 0, 1, 2, 3, 7, 100)
Call = list[Any]


def bases() -> Iterator[tuple[str, Callable[..., Any], Call]]:
    """(name, op, arguments that fit): every op, at the sizes where its kernel is taken."""
    torch.manual_seed(0)
    for spatial, layout in ((2, BATCH_INNERMOST), (1, BATCH_INNERMOST)):
        size = (5, 6)[-spatial:]
        x = layouts.as_layout(torch.randn(16, 4, *size), layout)
        w, b = torch.randn(8, 2, *(3, 2)[-spatial:]), torch.randn(8)
        steps: list[Any] = [[2] * spatial, [1] * spatial, [1] * spatial]
        kept = OPS.pack(x, torch.tensor(0.5), spatial, "nchw", torch.float32, layout)
        call = [x, w, b, torch.tensor(0.7), kept, *steps, 2, None, "constant", "w/wa", "nchw"]
        call += [None, "nchw", "", "nchw", layout, None]
        yield f"conv {spatial}d", OPS.conv, call
        grad = torch.randn_like(OPS.conv(*call))
        back = [grad, None, kept, w, torch.tensor(0.7), list(x.shape), [True, True, True]]
        back += call[5:]
        yield f"conv_backward {spatial}d", OPS.conv_backward, back
    x, w, b = torch.randn(4, 5, 12), torch.randn(8, 12), torch.randn(8)
    kept = OPS.pack(x, torch.tensor(0.5), 0, "nchw", torch.float32, ROW_MAJOR)
    call = [x, w, b, torch.tensor(0.7), kept, "w/wa", "nchw", None, "nchw", "", "nchw", None, True]
    yield "linear", OPS.linear, call
    back = [torch.randn(4, 5, 8), None, kept, w, torch.tensor(0.7), [4, 5, 12], [True] * 3]
    yield "linear_backward", OPS.linear_backward, [*back, *call[5:]]
    yield from leaves(torch.float32)
    yield from leaves(torch.bfloat16)


def leaves(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any], Call]]:
    """Norms, ReLUs, dropout, pools, packing and changes of layout, of activations of a dtype."""
    for layout in (ROW_MAJOR, CHANNELS_LAST, BATCH_INNERMOST):
        x = layouts.as_layout(torch.randn(16, 16, 5, 4).to(dtype), layout)
        four = [torch.rand(16) + 0.5 for _ in range(4)]
        for saves in ("exact", "int8", "int4"):
            call = [x, x.clone(), *four, True, 0.1, 1e-5, True, saves]
            yield f"batch_norm {saves} {layout}", OPS.batch_norm, call
            _, mean, invstd, _, _, code = OPS.batch_norm(*call)
            seen = x if saves == "exact" else None
            back = [torch.randn_like(x), seen, code, four[0], four[1], mean, invstd, [True] * 4]
            back += [list(x.shape), layout, True, True, True, saves]
            yield f"batch_norm_backward {saves} {layout}", OPS.batch_norm_backward, back
        for saves in ("int8", "int4"):
            code = OPS.elementwise(x, "silu", saves)[1]
            back = [torch.randn_like(x), code, layout, saves]
            yield f"elementwise_backward {saves} {layout}", OPS.elementwise_backward, back
        yield f"relu {layout}", OPS.relu, [x]
        bits = OPS.relu(x)[1]
        yield f"relu_backward {layout}", OPS.relu_backward, [x, bits, layout]
        yield f"dropout_backward {layout}", OPS.dropout_backward, [x, bits, 0.5, layout]
        windows: list[Any] = [[3, 2], [2, 2], [1, 1], [1, 1]]
        y, index = OPS.max_pool2d(x, *windows, False)
        yield f"max_pool2d {layout}", OPS.max_pool2d, [x, *windows, False, True]
        back = [torch.randn_like(y), index, list(x.shape), layout, *windows, False]
        yield f"max_pool2d_backward {layout}", OPS.max_pool2d_backward, back
        for other in (ROW_MAJOR, CHANNELS_LAST, BATCH_INNERMOST):
            yield f"to_layout {layout} {other}", OPS.to_layout, [x, other]
            call = [x, torch.tensor(0.5, dtype=dtype), 2, "nchw", dtype, other]
            yield f"pack {layout} {other}", OPS.pack, call
        yield (
            f"pack chw {layout}",
            OPS.pack,
            [x, torch.rand(16, 1, 1, 1).to(dtype), 2, "chw", dtype, ""],
        )


def other_tensors(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that do not fit where `x` does."""
    for d in range(x.dim()):
        size = x.shape[d]
        yield f"no {d}", x.narrow(d, 0, 0)
        if size > 1:
            yield f"less {d}", x.narrow(d, 0, size - 1)
            yield f"one {d}", x.narrow(d, 0, 1)
        yield f"more {d}", torch.cat([x, x.narrow(d, 0, 1)], d)
        yield f"gaps {d}", x.repeat_interleave(2, d).unflatten(d, (size, 2)).select(d + 1, 0)
        yield f"expanded {d}", x.narrow(d, 0, 1).expand(x.shape)
        yield f"without {d}", x.select(d, 0)
    yield "one dimension more", x.unsqueeze(0)
    yield "flat", x.reshape(-1)
    yield "empty", x.new_empty(0)
    yield "turned", x.permute(tuple(reversed(range(x.dim()))))
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.float32):
        if x.dtype != dtype:
            yield str(dtype), x.to(dtype)
    if x.dtype is torch.uint8 and x.numel():
        yield "ones", torch.full_like(x, 255)
        yield "zeros", torch.zeros_like(x)


def others(value: Any) -> Iterator[tuple[str, Any]]:
    """What may stand in an argument's place, and should not."""
    if isinstance(value, Tensor):
        yield from other_tensors(value)
        yield "None", None
    elif isinstance(value, bool):
        yield f"{not value}", not value
    elif isinstance(value, int):
        yield from ((str(n), n) for n in INTEGERS)
    elif isinstance(value, list):
        for i in range(len(value)):
            for _, new in others(value[i]):
                yield f"[{i}] {new}", [*value[:i], new, *value[i + 1 :]]
        if value:
            yield "shorter", value[:-1]
            yield "longer", [*value, value[-1]]
            yield "nothing", []
    elif value in (ROW_MAJOR, CHANNELS_LAST, BATCH_INNERMOST):
        yield from ((n, n) for n in (ROW_MAJOR, CHANNELS_LAST, BATCH_INNERMOST, "unheard of"))
    elif isinstance(value, torch.dtype):
        yield from ((str(d), d) for d in (torch.bfloat16, torch.float16, torch.float64))
    elif value in ("exact", "int8", "int4"):
        yield from ((n, n) for n in ("exact", "int8", "int4", "nothing"))
    elif value == "nchw":
        yield from ((n, n) for n in ("chw", "hw", "filter"))


def outcome(op: Callable[..., Any], call: Call) -> list[Tensor] | Exception:
    """What comes of it, as a list."""
    try:
        found = op(*call)
    except Exception as error:  # of any type: eager's own, mostly
        return error
    return list(found) if isinstance(found, (tuple, list)) else [found]


def disagreement(op: Callable[..., Any], call: Call) -> str:
    """How the kernels differ from plain torch on a call; "" if they do not."""
    fast = outcome(op, call)
    with kernels.reference_only():
        plain = outcome(op, call)
    if isinstance(fast, Exception) or isinstance(plain, Exception):
        if isinstance(fast, Exception) and isinstance(plain, Exception):
            return ""
        if "a winner outside its image" in str(plain):
            return ""  # the kernel asks each window for its winners, and passes over such
        return f"kernels: {fast!s:.200}; plain torch: {plain!s:.200}"
    # In bfloat16 plain torch rounds at each of several steps, also what it sums; ours once.
    narrow = any(isinstance(a, Tensor) and a.dtype is torch.bfloat16 for a in call)
    tolerance = 0.1 if narrow else 1e-3
    # A header of codes that is none may stand for any numbers, and sums of these for anything.
    coded = "int8" in call or "int4" in call
    garbled = coded and any(_is_of_one_byte(a) for a in call)
    for one, other in zip(fast, plain, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{one.shape} {one.dtype}; plain torch {other.shape} {other.dtype}"
        if one.dtype is torch.uint8 and "int4" in call:
            continue  # by chance, which another grid makes another
        if one.dtype is torch.uint8:  # a norm's codes may round otherwise
            far = (one.int() - other.int()).abs() > 1
            if far.float().mean() > 0.02:
                return "other bytes"
        elif garbled:
            continue
        elif not torch.allclose(one, other, atol=tolerance, rtol=tolerance, equal_nan=True):
            return f"values off by {(one - other).abs().max().item():.3g}"
    return ""


def _is_of_one_byte(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dtype is not torch.uint8 or not value.numel():
        return False
    return bool((value == value.reshape(-1)[0]).all())


def calls(pairs: int) -> Iterator[tuple[str, Callable[..., Any], Call]]:
    """Every single misfit of every argument, and `pairs` random ones of two."""
    pick = random.Random(0)
    for name, op, call in bases():
        yield f"{name}: as it should be", op, call
        single = [(i, what, new) for i, v in enumerate(call) for what, new in others(v)]
        for i, what, new in single:
            yield f"{name}: argument {i} {what}", op, [*call[:i], new, *call[i + 1 :]]
        for _ in range(pairs):
            (i, one, a), (j, two, b) = pick.sample(single, 2)
            both = list(call)
            both[i], both[j] = a, b
            yield f"{name}: argument {i} {one}, argument {j} {two}", op, both


def main(pairs: int) -> None:
    assert kernels.available()
    made, wrong = 0, []
    for name, op, call in calls(pairs):
        print(name, file=sys.stderr, flush=True)
        found = disagreement(op, call)
        made += 1
        if found:
            wrong.append(f"{name}: {found}")
    print(*wrong, sep="\n")
    print(f"{made} calls, {len(wrong)} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main(int(sys.argv[1]))
