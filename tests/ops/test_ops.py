"""The ops one by one: torch's own checks, and eager's values at density 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swatfx import selectors
from swatfx.density import Density
from swatfx.errors import SwatError
from swatfx.selectors import Axes
from swatfx.tensors import layouts

torch.set_num_threads(1)
OPS = torch.ops.swatfx
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of `swatfx::conv`, or of `swatfx::linear` if the weight has 2 dims."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"
    sparse: str = "w/wa"
    weight_selector: str = "nchw"
    activation_selector: str = "nchw"
    sparsity: float = 0.5
    packed: bool = True
    channels_last: tuple[bool, bool] = (False, False)  # input, weight
    gradient: str = ""
    input_grad: bool = True
    weight_grad: bool = True
    open: float | None = None

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias, as leaves."""
        generator = torch.Generator().manual_seed(sum(self.shape) + sum(self.weight))
        x = torch.randn(self.shape, generator=generator, dtype=dtype)
        w = torch.randn(self.weight, generator=generator, dtype=dtype)
        if self.channels_last[0]:
            x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
        if self.channels_last[1]:
            w = w.contiguous(memory_format=CHANNELS_LAST[w.dim()])
        b = torch.randn(self.weight[0], generator=generator, dtype=dtype) if self.bias else None
        if b is not None:
            b.requires_grad_()
        return x.requires_grad_(self.input_grad), w.requires_grad_(self.weight_grad), b

    def arguments(self, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[tuple[Any, ...], dict]:
        """Positional and keyword arguments of the op."""
        spatial = w.dim() - 2
        density = Density.from_sparsity(self.sparsity)
        state = selectors.get(self.weight_selector).state(w.detach(), density, Axes(0, 1), 7)
        axes = Axes.of(x.dim(), spatial, False)
        chosen = selectors.get(self.activation_selector)
        a_t = chosen.state(x.detach(), density, axes, 8)
        kept = None
        if self.packed:
            layout = "row_major" if self.pad else ""
            kept = OPS.pack(x.detach(), a_t, spatial, self.activation_selector, x.dtype, layout)
        options: dict[str, Any] = {"sparse": self.sparse, "weight_selector": self.weight_selector}
        if "a" in self.sparse.partition("/")[0]:
            options["activation_state"] = a_t
            options["activation_selector"] = self.activation_selector
        if self.gradient:
            options["gradient_density"] = self.gradient
        if self.open is not None:
            options["open"] = torch.tensor(self.open, dtype=torch.float64)
        args: tuple[Any, ...] = (x, w, b, state, kept)
        if spatial:
            if self.pad:
                options |= {"pad": self.pad, "pad_mode": self.pad_mode}
                args = (nn.functional.pad(x, self.pad, self.pad_mode), *args[1:])
            args += ([self.stride] * spatial, [self.padding] * spatial, [self.dilation] * spatial)
            args += (self.groups,)
        return args, options

    @property
    def op(self) -> Callable[..., Tensor]:
        """The op."""
        op: Callable[..., Tensor] = OPS.conv if len(self.weight) > 2 else OPS.linear
        return op

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        return len(self.weight) == 2


CONVS = {
    "conv1d": Sample((2, 4, 9), (6, 4, 3), stride=2, padding=1),
    "conv2d": Sample((2, 4, 6, 5), (6, 4, 3, 3), padding=1),
    "conv3d": Sample((2, 3, 4, 4, 4), (4, 3, 2, 2, 2)),
    "strided": Sample((2, 4, 7, 7), (6, 4, 3, 3), stride=2, bias=False),
    "dilated": Sample((2, 4, 7, 7), (6, 4, 3, 3), dilation=2, padding=2),
    "grouped": Sample((2, 4, 6, 6), (6, 2, 3, 3), groups=2, padding=1),
    "depthwise": Sample((2, 4, 6, 6), (8, 1, 3, 3), groups=4, padding=1),
    "pointwise": Sample((2, 4, 3, 3), (6, 4, 1, 1)),
    "unbatched": Sample((4, 6, 6), (6, 4, 3, 3), padding=1),
    "empty": Sample((0, 4, 6, 6), (6, 4, 3, 3)),
    "last": Sample((2, 4, 6, 6), (6, 4, 3, 3), channels_last=(True, True)),
    "last_input": Sample((2, 4, 6, 6), (6, 4, 3, 3), channels_last=(True, False)),
    "last_weight": Sample((2, 4, 6, 6), (6, 4, 3, 3), channels_last=(False, True)),
    "last3d": Sample((2, 4, 4, 4, 4), (6, 4, 2, 2, 2), channels_last=(True, True)),
    "circular": Sample((2, 4, 6, 6), (6, 4, 3, 3), pad=(1, 1, 1, 1), pad_mode="circular"),
    "lopsided": Sample((2, 4, 6, 6), (6, 4, 2, 2), pad=(0, 1, 0, 1)),
    "last_pad": Sample(
        (2, 4, 6, 6), (6, 4, 3, 3), pad=(1, 1, 1, 1), pad_mode="reflect", channels_last=(True, True)
    ),
}
LINEARS = {
    "linear": Sample((5, 8), (6, 8)),
    "vector": Sample((8,), (6, 8)),
    "sequence": Sample((2, 5, 8), (6, 8), bias=False),
    "rank4": Sample((2, 3, 2, 8), (6, 8)),
    "no_rows": Sample((0, 8), (6, 8)),
}
LAYERS = CONVS | LINEARS
VARIANTS = {
    f"{kind}_{name}": Sample(*shapes, **options)
    for kind, shapes in {"conv": ((2, 4, 5, 5), (6, 4, 3, 3)), "linear": ((5, 8), (6, 8))}.items()
    for name, options in {
        "saw": {"sparse": "/wa"},
        "meprop": {"sparse": "/g", "packed": False, "gradient": "1/2"},
        "weights": {"sparse": "w/", "packed": False},
        "activations": {"sparse": "a/", "packed": False},
        "active": {"sparse": "w/wa!"},
        "held": {"sparse": "w/wa!", "weight_selector": "held:nchw", "open": 0.0},
        "open": {"sparse": "w/wa!", "weight_selector": "held:nchw", "open": 1.0},
        "filter": {"weight_selector": "filter"},
        "n_of_m": {"weight_selector": "2:4"},
        "random": {"weight_selector": "random", "activation_selector": "random"},
        "chw": {"weight_selector": "chw", "activation_selector": "chw"},
        "input_only": {"weight_grad": False},
        "weight_only": {"input_grad": False},
        "bias_only": {"input_grad": False, "weight_grad": False},
    }.items()
}


# opcheck itself looks at .grad of tensors that it has cloned.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", [*LAYERS, *VARIANTS])
def test_opcheck(name: str) -> None:
    sample = (LAYERS | VARIANTS)[name]
    args, options = sample.arguments(*sample.tensors())
    # A leaf, so that opcheck may ask for its gradient.
    args = (args[0].detach().requires_grad_(sample.input_grad), *args[1:])
    torch.library.opcheck(sample.op, args, options)


@pytest.mark.parametrize("wants", [(True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("name", [*LAYERS, *VARIANTS])
def test_opcheck_backward(name: str, wants: tuple[bool, ...]) -> None:
    sample = (LAYERS | VARIANTS)[name]
    x, w, b = sample.tensors()
    args, options = sample.arguments(x.detach(), w.detach(), b)
    with torch.no_grad():
        grad = torch.randn_like(sample.op(*args, **options))
    input, weight, _, state, kept = args[:5]
    head = (grad, None if sample.packed else input, kept, weight, state, list(input.shape))
    head = (*head, list(wants))
    told = {"sparse": sample.sparse, "weight_selector": sample.weight_selector}
    told |= {"gradient_density": sample.gradient}
    if sample.is_linear:
        torch.library.opcheck(OPS.linear_backward, head, told)
    else:
        told |= {"pad": list(sample.pad), "pad_mode": sample.pad_mode}
        told |= {"layout": layouts.layout_of(input)}
        torch.library.opcheck(OPS.conv_backward, (*head, *args[5:9]), told)


@pytest.mark.parametrize("selector", ["nchw", "chw", "hw", "random"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (4, 5, 5), (0, 4, 5, 5)])
def test_opcheck_pack(selector: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    axes = Axes.of(len(shape), 2, False)
    state = selectors.get(selector).state(x, Density.from_sparsity(0.5), axes, 1)
    torch.library.opcheck(OPS.pack, (x, state, 2, selector, torch.bfloat16))
    last = x if x.dim() < 4 else x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OPS.pack, (last, state, 2, selector, torch.float32, "row_major"))


@pytest.mark.parametrize(
    ("selector", "is_weight"),
    [(s, w) for s in ("nchw", "chw", "random") for w in (True, False)] + [("2:4", True)],
)
@pytest.mark.parametrize("iteration", [0, 1])
def test_opcheck_refresh(selector: str, is_weight: bool, iteration: int) -> None:
    x = torch.randn(4, 8, 3, 3)
    chosen = selectors.get(selector)
    density = Density.from_sparsity(0.5)
    shape = chosen.state_shape((4, 8, 3, 3), Axes(0, 1))
    if chosen.groups and not is_weight:
        shape = ()
    state = torch.zeros(shape, dtype=chosen.state_dtype(x.dtype))
    step = torch.tensor([iteration, 0, iteration + 1, 0, 7])
    stamp = torch.tensor(0)
    buffers = (torch.tensor(density.value, dtype=torch.float64), torch.tensor([1, 2]))
    args = (x, state, stamp, step, *buffers, 3, selector, "fc", 2, is_weight, 5)
    torch.library.opcheck(OPS.refresh, args)


@pytest.mark.parametrize("selector", ["nchw", "random"])
@pytest.mark.parametrize("iteration", [3, 4])
def test_opcheck_refresh_call(selector: str, iteration: int) -> None:
    x = torch.randn(2, 8, 5, 5)
    chosen = selectors.get(selector)
    state = chosen.state(x, Density.from_sparsity(0.5), Axes(0, 1), 5)
    step = torch.tensor([iteration, 0, iteration + 1, 0, 7])
    buffers = (torch.tensor(0.5, dtype=torch.float64), torch.tensor([1, 2]))
    args = (x, torch.stack([state] * 4), torch.full((4,), -1), step, *buffers, 3, selector, "fc", 2)
    torch.library.opcheck(OPS.refresh_call, args)


@pytest.mark.parametrize("selector", ["nchw", "hw", "channel", "random", "2:4", "held:nchw"])
@pytest.mark.parametrize("held", [None, 0.0, 1.0])
def test_opcheck_current(selector: str, held: float | None) -> None:
    weight = torch.randn(4, 8, 3, 3)
    chosen = selectors.get(selector)
    state = chosen.state(weight, Density.from_sparsity(0.5), Axes(0, 1), 5)
    numbers = (torch.tensor(3), torch.tensor(7), torch.tensor(0.5).double())
    flag = None if held is None else torch.tensor(held, dtype=torch.float64)
    args = (weight, state, *numbers, torch.tensor([1, 2]), selector, "fc", 5, 10**9, flag)
    torch.library.opcheck(OPS.current, args)
    found = OPS.current(*args)
    assert not held or (torch.equal(found, state) and found is not state)


def test_a_flag_on_the_host_casts_no_input_elsewhere() -> None:
    x, w = torch.randn(5, 8, device="meta"), torch.randn(6, 8, device="meta")
    state, flag = torch.zeros(6, dtype=torch.uint8, device="meta"), torch.zeros((), device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for opened in (None, flag.double()):
            told = {"sparse": "w/!", "weight_selector": "held:nchw", "open": opened}
            assert OPS.linear(x, w, None, state, None, **told).dtype == torch.float32


@pytest.mark.parametrize("inputs", [[], [torch.ones(2, 3)]])
@pytest.mark.parametrize("advance", [True, False])
def test_opcheck_step(inputs: list[Tensor], advance: bool) -> None:
    # Each call has a number of its own, so that two runs differ, traced or not.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (torch.tensor(4), 10**9, inputs, advance, "" if advance else "body")
    torch.library.opcheck(OPS.step, args, test_utils=utils)
    first, second = OPS.step(*args).tolist(), OPS.step(*args).tolist()
    assert first[:4] == second[:4] == [4 if advance else 3, 0, 5 if advance else 4, 10**9]
    assert first[4] < second[4]


@pytest.mark.parametrize("name", [n for n, s in LAYERS.items() if 0 not in s.shape])
@pytest.mark.parametrize("packed", [True, False])
def test_gradcheck_at_density_one(name: str, packed: bool) -> None:
    sample = LAYERS[name]
    x, w, b = sample.tensors(torch.float64)
    zero = torch.zeros((), dtype=torch.float64)

    def call(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        args, options = sample.arguments(x, w, rest[0] if rest else None)
        kept = None
        if packed:
            layout = "row_major" if sample.pad else ""
            kept = OPS.pack(x.detach(), zero, w.dim() - 2, "nchw", x.dtype, layout)
        return sample.op(*args[:3], zero, kept, *args[5:], **options)

    leaves = (x, w) if b is None else (x, w, b)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_double_backward_says_no(name: str) -> None:
    sample = LAYERS[name]
    x, w, b = sample.tensors()
    args, options = sample.arguments(x, w, b)
    (grad,) = torch.autograd.grad(sample.op(*args, **options).pow(2).sum(), x, create_graph=True)
    with pytest.raises(SwatError, match="policy 'dense'"):
        grad.pow(2).sum().backward()
