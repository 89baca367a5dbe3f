"""Calls every compiled kernel, through its op or wrapper, on shapes that reach its edges.

Run as a script, with SWATFX_KERNELS naming a library that was built with sanitizers: they write to
stderr and exit. Prints which C functions were called. Results are compared elsewhere.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from swatfx import kernels, selectors
from swatfx.density import Density
from swatfx.kernels import library
from swatfx.ops import codes
from swatfx.ops.calls import ConvCall, LinearCall
from swatfx.ops.where import active_weight
from swatfx.selectors import Axes, topk
from swatfx.tensors import bits, layouts
from swatfx.tensors.keeping import let_keep
from tests.nets.kernel_calls import SAMPLES, Sample, random_sample, run_linear
from tests.nets.topk_data import KINDS, draw

OPS = torch.ops.swatfx
BATCH = layouts.BATCH_INNERMOST
LAYOUTS = (layouts.ROW_MAJOR, layouts.CHANNELS_LAST, layouts.BATCH_INNERMOST)
BATCHES = (0, 1, 5, 17, 40)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
called: set[str] = set()


def watch() -> None:
    """Note the name of every C function that is asked for."""
    real = library.function

    def function(name: str, restype: Any = None, **options: Any) -> Callable[..., Any]:
        called.add(name + "_bf16" * (options.get("elements") is torch.bfloat16))
        return real(name, restype, **options)

    for module in (kernels.pack, kernels.topk):
        module.__dict__["function"] = function
    library.function = function


def activations(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """In every layout: random, all zeros, nothing zero; in bfloat16."""
    torch.manual_seed(0)
    for layout in LAYOUTS:
        random = torch.randn(shape)
        for x in (random, torch.zeros(shape), torch.ones(shape), random.bfloat16()):
            yield layouts.as_layout(x, layout)


def convolutions() -> None:
    """Forward, input gradient and weight gradient."""
    for sample in SAMPLES.values():
        sample.run()
    for seed in range(60):
        random_sample(seed).run(seed)
    for batch, dtype, threshold in itertools.product(
        BATCHES, (None, torch.bfloat16), (0.0, 0.8, 9.0)
    ):
        options = {"kept_dtype": dtype, "weight_threshold": threshold}
        options |= {"activation_threshold": threshold, "bias": True}
        for shapes in (
            ((batch, 1, 7, 9), (1, 1, 3, 3)),
            ((batch, 19, 3, 5), (35, 19, 1, 1)),
            ((batch, 6, 13), (18, 3, 4), (3,), (2,), (2,), 2),
            ((batch, 6, 9, 7), (18, 2, 3, 2), (2, 3), (1, 2), (1, 2), 3),
            ((batch, 5, 8, 6), (17, 5, 1, 1), (2, 3)),
            ((batch, 3, 4, 4), (5, 3, 4, 4)),
        ):
            Sample(*shapes, **options).run()
    # Large enough a result to be written around the caches, and channels enough for two blocks.
    Sample((16, 2, 64, 66), (64, 2, 1, 1)).run()
    Sample((16, 530, 2, 3), (16, 530, 1, 1)).run()
    Sample((20, 140, 3, 4), (33, 140, 3, 3), padding=(1, 1)).run()


def sampled() -> None:
    """Weight gradients at active weights, or of packed activations; weights by their masks."""
    for batch, dtype, density in itertools.product(BATCHES[1:], DTYPES[:2], (0.0, 0.2, 1.0)):
        for size, shape, steps in (
            ((7, 9), (1, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
            ((3, 5), (35, 19, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
            ((9, 7), (18, 2, 3, 2), ((2, 3), (1, 2), (1, 2), 3)),
            ((8, 6), (17, 5, 1, 1), ((2, 3), (0, 0), (1, 1), 1)),
            ((4, 150), (5, 70, 4, 4), ((1, 1), (2, 2), (1, 1), 1)),
        ):
            weight, groups = torch.randn(shape), steps[-1]
            state = bits.mask_to_bits(torch.rand(shape) < density)
            x = torch.randn(batch, shape[1] * groups, *size).to(dtype)
            x = layouts.as_layout(x, BATCH)
            call = ConvCall(*steps, sparse="w/w!", weight_selector="held:nchw", layout=BATCH)
            y = OPS.conv(x, weight, None, state, None, *call.options)
            rest = (weight, state, list(x.shape), [True] * 3)
            OPS.conv_backward(y, x, None, *rest, *call.options)
            kept = OPS.pack(x, torch.tensor(0.5), 2, "nchw", dtype, BATCH)
            OPS.conv_backward(y, None, kept, *rest, *call.options)
        for name, shape in (("block-4x1", (18, 9, 3, 3)), ("block-2x3", (5, 70, 1, 1))):
            weight, steps = torch.randn(shape), ((1, 1), (1, 1), (1, 1), 1)
            x = layouts.as_layout(torch.randn(batch, shape[1], 5, 13).to(dtype), BATCH)
            call = ConvCall(*steps, weight_selector=name, layout=BATCH)
            state = torch.tensor(1 - density)
            y = OPS.conv(x, weight, None, state, None, *call.options)
            rest = (weight, state, list(x.shape), [True, False, False])
            OPS.conv_backward(y, None, None, *rest, *call.options)
        for rows in (1, 16, 40):
            x, weight = torch.randn(rows * batch, 19).to(dtype), torch.randn(33, 19)
            state = bits.mask_to_bits(torch.rand(weight.shape) < density)
            record = LinearCall(sparse="w/w!", weight_selector="held:nchw", sparse_kernels=True)
            y = OPS.linear(x, weight, None, state, None, *record.options)
            others = (weight, state, list(x.shape), [True] * 3)
            OPS.linear_backward(y, x, None, *others, *record.options)
            kept = OPS.pack(x, torch.tensor(0.5), 0, "nchw", dtype)
            OPS.linear_backward(y, None, kept, *others, *record.options)


def kept_rows() -> None:
    """Forward by rows that were made once: made, and read."""
    for batch, dtype, least in itertools.product((1, 3, 16, 17), DTYPES[:2], (0.0, 1.0, 9.0)):
        for shape, weight, call in (
            ((9, 7), torch.randn(18, 2, 3, 2), ConvCall((1, 1), (1, 1), (1, 1), 3, layout=BATCH)),
            ((7, 7), torch.randn(33, 19, 3, 3), ConvCall((2, 2), (1, 1), (1, 1), 1, layout=BATCH)),
            ((5, 5), torch.randn(6, 1, 3, 3), ConvCall((1, 1), (1, 1), (1, 1), 6, layout=BATCH)),
        ):
            x = torch.randn(batch, weight.shape[1] * call.groups, *shape).to(dtype)
            state = let_keep(torch.tensor(least))
            for _ in range(2):
                OPS.conv(layouts.as_layout(x, BATCH), weight, None, state, None, *call.options)
        record, state = LinearCall(sparse_kernels=True), let_keep(torch.tensor(least))
        x, weight = torch.randn(batch, 19).to(dtype), torch.randn(33, 19)
        for _ in range(2):
            OPS.linear(x, weight, None, state, None, *record.options)


def linear() -> None:
    """As convolutions, for matrices."""
    for rows, inputs, outputs in itertools.product((0, 1, 5, 17, 40), (1, 19, 64), (1, 33)):
        for dtype, threshold in ((None, 0.7), (torch.bfloat16, 0.0), (None, 9.0)):
            options = {"weight_threshold": threshold, "activation_threshold": threshold}
            run_linear((rows, inputs), outputs, kept_dtype=dtype, **options)
    run_linear((3, 7, 30), 20, transposed_weight=True)
    run_linear((130, 300), 129)


def leaves() -> None:
    """Norms, ReLUs, dropout, pools and changes of layout."""
    for batch, rest in itertools.product(
        BATCHES, ((1, 5, 7), (3, 1, 1), (17, 6, 5), (5, 19), (2, 3, 4, 5))
    ):
        channels = rest[0]
        for x in activations((batch, *rest)):
            for saves, training, relu, plus in itertools.product(
                ("exact", "int8", "int4", "nothing"), (True, False), (True, False), (True, False)
            ):
                if training and batch * torch.Size(rest[1:]).numel() <= 1:
                    continue
                args = [torch.rand(channels) + 0.5 for _ in range(4)]
                leaf = x.clone().requires_grad_(saves != "nothing")
                with torch.set_grad_enabled(saves != "nothing"):
                    y = OPS.batch_norm(
                        leaf, x if plus else None, *args, training, 0.1, 1e-5, relu, saves
                    )[0]
                    if y.requires_grad:
                        y.backward(torch.randn_like(y))
            for saves in codes.BITS if x.numel() else ():
                code = codes.encode_flat(x.reshape(-1), saves)
                codes.decode_flat(code, x.numel(), saves, x.dtype)
                codes.decode_flat(torch.full_like(code, 255), x.numel(), saves, x.dtype)
            for op in (OPS.relu, lambda t: OPS.dropout(t, 0.3)):
                leaf = x.clone().requires_grad_()
                op(leaf)[0].backward(x)
            for layout in layouts.FEATURES_OUTERMOST if x.numel() else ():
                lies = layouts.as_layout(x.movedim(1, -1), layout).detach()
                for wants in ((True, True, True), (False, True, False)):
                    given = [t.clone() for t in (lies, *args[:2])]  # a clone lies as it does
                    for t, wanted in zip(given, wants, strict=True):
                        t.requires_grad_(wanted)
                    OPS.features_norm(*given, 1e-5)[0].sum().backward()
            for layout in LAYOUTS:
                if x.dim() > 3 or layout != layouts.CHANNELS_LAST:
                    OPS.to_layout(x, layout)


def pools() -> None:
    for batch, size in itertools.product(BATCHES, ((7, 9), (3, 3), (12, 33))):
        for x in activations((batch, 5, *size)):
            for kernel, stride, padding, dilation in (
                ((2, 2), (2, 2), (0, 0), (1, 1)),
                ((3, 3), (2, 2), (1, 1), (1, 1)),
                ((3, 2), (1, 3), (1, 1), (1, 2)),
                ((2, 2), (1, 1), (1, 1), (2, 2)),
            ):
                for ceil_mode in (False, True):
                    leaf = x.clone().requires_grad_()
                    args = (leaf, kernel, stride, padding, dilation, ceil_mode)
                    OPS.max_pool2d(*args, False)
                    y = OPS.max_pool2d(*args, True)[0]
                    y.backward(torch.randn_like(y))


def top_k() -> None:
    """Thresholds, packing, unpacking and masks."""
    sizes = (1, 2, 15, 16, 17, 63, 64, 65, 127, 1023, 1024, 1025, 4097, 131073, 400001)
    for size, kind, dtype in itertools.product(sizes, KINDS, DTYPES):
        x = draw(kind, (size,), dtype)
        for sparsity in (0.1, 0.9):
            threshold_and_pack(x, "nchw", Density.from_sparsity(sparsity), 0)
    for shape in ((5, 3, 7, 9), (1, 1, 1, 1), (17, 2, 33, 31), (40, 19, 3, 3), (3, 9000, 1, 2)):
        for layout, selector, kind in itertools.product(LAYOUTS, ("nchw", "chw", "hw"), KINDS):
            for dtype in DTYPES:
                x = layouts.as_layout(draw(kind, shape, dtype), layout)
                threshold_and_pack(x, selector, Density.from_sparsity(0.7), 2)
    x = layouts.as_layout(torch.randn(16, 40, 60, 60), layouts.BATCH_INNERMOST)
    for selector in ("nchw", "chw", "hw"):
        threshold_and_pack(x, selector, Density.from_sparsity(0.9), 2)
    counter = topk.digit_counter(torch.rand(300_001))
    assert counter is not None
    counter(0, 20, 11)


def threshold_and_pack(x: Tensor, selector: str, density: Density, spatial: int) -> None:
    axes = Axes.of(x.dim(), spatial, False)
    chosen = selectors.get(selector)
    found = chosen.search(x, density, axes)
    state = chosen.state(x, density, axes, 0, None) if found is None else found[0]
    topk.holds_nan(x)
    for stored in {x.dtype, torch.bfloat16}:
        for bound in (state, torch.zeros_like(state), torch.full_like(state, torch.inf)):
            packed = OPS.pack(x, bound, spatial, selector, stored)
            bits.unpack(packed.reshape(-1), x.numel(), stored)
    keep = chosen.keep(x, state, axes).expand_as(x)
    flat = keep.reshape(-1)
    bits.pack(x.reshape(-1), flat, x.dtype)
    bits.bits_to_mask(bits.mask_to_bits(flat), flat.numel())
    active_weight(x, state, selector, x.dtype)
    active_weight(x, bits.mask_to_bits(flat), "held:nchw", x.dtype)


def main() -> None:
    assert kernels.available()
    watch()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for part in (convolutions, sampled, kept_rows, linear, leaves, pools, top_k):
            part()
    print(*sorted(called))


if __name__ == "__main__":
    # Whether a sanitizer is watching at all: one read past a tensor has to be seen.
    if "overrun" in __import__("sys").argv:
        library.function("swatfx_greatest", ctypes.c_int32)(
            library.pointer(torch.zeros(16)), 4, library.size(17), library.threads()
        )
    main()
