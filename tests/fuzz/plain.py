"""The oracle: one layer of every method by plain formulas, meant for float64.

Written from the paper's algorithm; it calls torch's dense convolution and matrix product, and
sorts. A layer that takes part computes y = op(a, w) + b with what its rule masks, the input
gradient from the weight that backward sees, the weight gradient from the activation that backward
sees, and the bias gradient from the whole output gradient.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from tests.fuzz.methods import Rule, count, count_held

Op = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Moment:
    """What one forward of a model is, and what was seen while swatfx ran it.

    Attributes:
        iteration: training forwards before it.
        training: whether it is one.
        calls: what sparse ops were given, in order, or None where the oracle's own values are
            what swatfx saw, bit for bit.
        autocast: dtype that layers see their input in, or None.
        absolute: sum magnitudes, to see how large rounding errors may be.
        problems: what was seen to be wrong on the way.
        margin: how near the nearest decision was to a tie, a fraction of the values' size.
        error: how far swatfx's layer inputs were from the oracle's, likewise.
        inputs: the oracle's layer inputs, where swatfx's are known.
    """

    iteration: int = 0
    training: bool = True
    calls: Iterator[dict[str, Tensor | None]] | None = None
    autocast: torch.dtype | None = None
    absolute: bool = False
    problems: list[str] = field(default_factory=list)
    margin: float = float("inf")
    error: float = 0.0
    inputs: list[Tensor] = field(default_factory=list)

    def decides(self, distance: Tensor, scale: Tensor) -> None:
        """Note how near to a tie a decision on computed values was, in units of their size."""
        if distance.numel():
            size = float(scale.detach().abs().mean()) or 1.0
            self.margin = min(self.margin, float(distance.detach().abs().min()) / size)


class Now:
    """Where layers of the oracle find the moment they run at."""

    def __init__(self) -> None:
        self.moment = Moment()

    @contextmanager
    def at(self, moment: Moment) -> Iterator[Moment]:
        """Run at `moment` inside."""
        before, self.moment = self.moment, moment
        try:
            yield moment
        finally:
            self.moment = before


NOW = Now()


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the root mean square of `b`; infinite if NaN is in it."""
    if not a.numel():
        return 0.0
    error = float((a - b).abs().max()) / (float(b.square().mean().sqrt()) or 1.0)
    return error if error == error else float("inf")


def threshold(scores: Tensor, density: Fraction | float, groups: tuple[int, ...] = ()) -> Tensor:
    """The k-th largest score, k from the density: of each index along `groups`, sizes 1 else."""
    if not scores.numel():
        return scores.new_zeros([1] * scores.dim())
    rest = [d for d in range(scores.dim()) if d not in groups]
    rows = scores.permute(*groups, *rest).reshape(*[scores.shape[d] for d in groups], -1)
    k = count(density, rows.shape[-1])
    if k >= rows.shape[-1]:
        bound = rows.new_zeros(rows.shape[:-1])
    else:
        bound = rows.sort(dim=-1, descending=True).values[..., k - 1]
    return bound.reshape([scores.shape[d] if d in groups else 1 for d in range(scores.dim())])


def weight_scores(w: Tensor, selector: str) -> tuple[Tensor, tuple[int, ...]]:
    """(what is ranked, dimensions along which thresholds differ) of a weight (F, C, *kernel)."""
    size, taps = w.abs(), list(range(2, w.dim()))
    if selector == "nchw":
        return size, ()
    if selector in ("chw", "learned"):
        return size, (0,)
    if selector == "hw":
        return size, (0, 1)
    if selector in ("channel", "channel-per-filter"):
        summed = size.sum(taps, keepdim=True) if taps else size
        return summed, () if selector == "channel" else (0,)
    if selector == "filter":
        return size.sum([1, *taps], keepdim=True), ()
    if selector == "input-channel":
        return size.sum([0, *taps], keepdim=True), ()
    if match := re.fullmatch(r"block-(\d+)x(\d+)", selector):
        return block_means(w, int(match[1]), int(match[2])).sqrt(), ()
    raise ValueError(selector)


def weight_state(w: Tensor, rule: Rule) -> Tensor:
    """What a refresh keeps: a threshold, or a mask where no threshold says it."""
    selector = rule.weight_selector
    if match := re.fullmatch(r"(\d+):(\d+)", selector):
        return largest_of(w, int(match[1]), int(match[2]))
    if match := re.fullmatch(r"ssc:g(\d+):p(\d+)", selector):
        return structured(w, int(match[1]), int(match[2]))
    scores, groups = weight_scores(w, selector)
    return threshold(as_ranked(scores, selector), rule.weight_density, groups)


def as_ranked(scores: Tensor, selector: str) -> Tensor:
    """Sums are ranked in single precision where the weights were in it."""
    summed = selector in SUMMED or selector.startswith("block-")
    return scores.float().double() if summed else scores


SUMMED = ("channel", "channel-per-filter", "filter", "input-channel")


def weight_keep(w: Tensor, state: Tensor, rule: Rule) -> Tensor:
    """Mask of the active weights."""
    if state.dtype is torch.bool:
        return state
    scores, _ = weight_scores(w, rule.weight_selector)
    return (as_ranked(scores, rule.weight_selector) >= state).expand_as(w)


def block_means(w: Tensor, filters: int, channels: int) -> Tensor:
    """Of each weight's block, the mean square."""
    means = torch.empty_like(w)
    for f in range(0, w.shape[0], filters):
        for c in range(0, w.shape[1], channels):
            block = w[f : f + filters, c : c + channels]
            means[f : f + filters, c : c + channels] = block.square().mean((0, 1))
    return means


def largest_of(w: Tensor, n: int, m: int) -> Tensor:
    """Mask of the n largest of every m consecutive weights along the input dimension."""
    keep = torch.zeros(w.shape, dtype=torch.bool)
    for first in range(0, w.shape[1], m):
        group = w[:, first : first + m].abs()
        order = group.argsort(dim=1, descending=True, stable=True)
        chosen = torch.zeros_like(group, dtype=torch.bool)
        chosen.scatter_(1, order[:, :n], True)
        keep[:, first : first + m] = chosen
    return keep


def structured(w: Tensor, g: int, p: int) -> Tensor:
    """SSC: filter n has the plus-shaped slice on channels n mod g, the centre on n mod p."""
    keep = torch.zeros(w.shape, dtype=torch.bool)
    filters, channels, *kernel = w.shape
    g, p = min(g, channels), min(p, channels)
    one_tap = all(size == 1 for size in kernel)
    for place in itertools.product(*map(range, kernel)):
        away = [abs(i - size // 2) for i, size in zip(place, kernel, strict=True)]
        plus, centre = sum(a > 0 for a in away) <= 1, not any(away)
        for n in range(filters):
            at = (n, slice(None), *place)
            channel = torch.arange(channels)
            if plus and not one_tap:
                keep[at] |= channel % g == n % g
            if centre:
                keep[at] |= channel % p == n % p
    return keep


def activation_groups(dims: int, spatial: int, selector: str) -> tuple[int, ...]:
    """Dimensions along which an activation's thresholds differ."""
    if spatial:
        sample, channel = (0, 1) if dims == spatial + 2 else (None, 0)
    else:
        sample, channel = (0 if dims > 1 else None), dims - 1
    named = {"nchw": [], "chw": [sample], "hw": [sample, channel]}[selector]
    return tuple(sorted({d for d in named if d is not None}))


def drawn(shape: torch.Size, state: Tensor) -> Tensor:
    """The mask that a random selector's state (seed, bits of the density) stands for."""
    density = float(state[1:].view(torch.float64))
    generator = torch.Generator().manual_seed(int(state[0]))
    return torch.rand(shape, generator=generator) < density


@dataclass
class WeightMemory:
    """A weight's selection over time; layers that share the weight share it."""

    rule: Rule
    state: Tensor | None = None
    iteration: int = -1
    seed: int | None = None

    def keep_first(self, w: Tensor) -> None:
        """Select from the weight as it is when the model is compiled."""
        if self.rule.weight_selector not in ("random", "learned"):
            self.state = weight_state(w, self.rule)

    def keep(self, w: Tensor, given: Tensor | None) -> Tensor:
        """The mask to use now; `given` is swatfx's own state, which random masks are read from."""
        moment, rule = NOW.moment, self.rule
        if rule.weight_selector == "random":
            assert given is not None
            return self._drawn(w, given)
        if rule.weight_selector == "learned":
            assert given is not None
            return (w.abs() >= given.double()).expand_as(w)
        assert self.state is not None
        if rule.held:
            return self._fixed(w)
        if not moment.training:
            return weight_keep(w, weight_state(w, rule), rule)
        if moment.iteration != self.iteration:
            self.iteration = moment.iteration
            if moment.iteration % rule.period == 0:
                self.state = weight_state(w, rule)
        return weight_keep(w, self.state, rule)

    def _fixed(self, w: Tensor) -> Tensor:
        assert self.state is not None
        if self.state.dtype is not torch.bool:
            self.state = weight_keep(w, self.state, self.rule).clone()
        return self.state

    def _drawn(self, w: Tensor, given: Tensor) -> Tensor:
        moment, rule, n = NOW.moment, self.rule, w.numel()
        if rule.held:
            bits = [given >> i & 1 for i in range(8)]
            keep = torch.stack(bits, 1).reshape(-1)[:n].bool().view(w.shape)
            if int(keep.sum()) != count_held(rule.weight_density, n):
                moment.problems.append(f"a random held mask keeps {int(keep.sum())} of {n}")
            if self.state is not None and not torch.equal(self.state, keep):
                moment.problems.append("a held mask moved")
            self.state = keep
            return keep
        keep, seed = drawn(w.shape, given), int(given[0])
        expected = float(rule.weight_density) * n
        if (
            abs(float(keep.sum()) - expected)
            > 7 * (expected * (1 - expected / max(n, 1))) ** 0.5 + 1
        ):
            moment.problems.append(f"a random mask keeps {int(keep.sum())} of {n}")
        if moment.training and moment.iteration != self.iteration:
            due = moment.iteration % rule.period == 0
            if self.seed is not None and self.iteration >= 0 and due == (seed == self.seed):
                moment.problems.append(f"a random mask was {'not ' * due}drawn anew")
            self.iteration, self.seed = moment.iteration, seed
        return keep


class Layer(nn.Module):
    """A convolution or linear layer that takes part in a method, in float64.

    Args:
        weight: (F, C / groups, *kernel) or (out, in).
        bias: (F,) or None.
        op: (activation, weight) -> what the layer adds its bias to.
        spatial: dimensions of the kernel.
        rule: of its method.
        memory: of its weight.
        low: what the op pads its input by before each spatial dimension, where swatfx's op sees
            the input padded.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        op: Op,
        spatial: int,
        rule: Rule,
        memory: WeightMemory,
        low: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.op, self.spatial, self.rule, self.memory, self.low = op, spatial, rule, memory, low
        self.thresholds: dict[int, Tensor] = {}  # of the n-th call in a forward
        self.learned: Tensor | None = None
        self.count = 0
        self.iteration = -1

    def forward(self, a: Tensor) -> Tensor:
        moment, rule = NOW.moment, self.rule
        given: dict[str, Tensor | None] = {}
        if moment.calls is not None:
            given = next(moment.calls)
        ranked = a.detach()
        if "input" in given and moment.autocast is None:
            ranked = self._agreed(a, given["input"])
        state = given.get("weight_state") if self.learned is None else self.learned.detach()
        weight_keep = self.memory.keep(self.weight.detach(), state)
        stored = ranked if rule.value_dtype is not None and moment.autocast is None else None
        activation_keep = torch.ones_like(ranked, dtype=torch.bool)
        if moment.training and (rule.backward_activation or rule.forward_activation):
            activation_keep = self._activation_keep(ranked, given)
        return _Product.apply(
            a, self.weight, self.bias, self.learned, weight_keep, activation_keep, stored, self
        )

    def _agreed(self, a: Tensor, seen: Tensor | None) -> Tensor:
        """What swatfx ranked, which has to be `a` but for rounding."""
        assert seen is not None
        for d, low in enumerate(self.low):
            dim = a.dim() - len(self.low) + d
            seen = seen.narrow(dim, low, a.shape[dim])
        moment, wide = NOW.moment, seen.double()
        if seen.shape != a.shape:
            moment.problems.append(f"an input of {tuple(seen.shape)}, not {tuple(a.shape)}")
            return a.detach()
        moment.inputs.append(a.detach())
        moment.error = max(moment.error, apart(wide, a.detach()))
        return wide

    def _activation_keep(self, a: Tensor, given: dict[str, Tensor | None]) -> Tensor:
        moment, rule = NOW.moment, self.rule
        if moment.iteration != self.iteration:
            self.iteration, self.count = moment.iteration, 0
        call, self.count = self.count, self.count + 1
        if rule.activation_selector == "random":
            state = given.get("activation_state")
            if state is None:  # nothing was kept: no gradient asks for it
                return torch.ones_like(a, dtype=torch.bool)
            keep = drawn(a.shape, state)
            expected = float(rule.activation_density) * a.numel()
            spare = 7 * (expected * (1 - float(rule.activation_density))) ** 0.5 + 1
            if abs(float(keep.sum()) - expected) > spare:
                moment.problems.append(f"a random mask keeps {int(keep.sum())} of {a.numel()}")
            return keep
        groups = activation_groups(a.dim(), self.spatial, rule.activation_selector)
        due = moment.iteration % rule.period == 0 or rule.activation_selector != "nchw"
        if a.numel() == 0:
            return torch.ones_like(a, dtype=torch.bool)
        if due or call not in self.thresholds:
            self.thresholds[call] = threshold(a.abs(), rule.activation_density, groups)
        return (a.abs() >= self.thresholds[call]).expand_as(a)


class _Product(torch.autograd.Function):
    """The layer's product and its gradients, by the table of the paper."""

    @staticmethod
    def forward(ctx, a, w, b, t, weight_keep, activation_keep, stored, layer):  # type: ignore[no-untyped-def]
        rule, autocast = layer.rule, NOW.moment.autocast
        seen_a, seen_w = rounded(a, autocast), rounded(w, autocast)
        used_a = seen_a * activation_keep if rule.forward_activation else seen_a
        used_w = seen_w * weight_keep if rule.forward_weight else seen_w
        kept_a = seen_a * activation_keep if rule.backward_activation else seen_a
        if rule.backward_activation and NOW.moment.training and weight_needs(ctx, t):
            if stored is not None:  # a rounding error may be one step of the narrow dtype
                kept_a = stored.to(a.dtype) * activation_keep
            kept_a = rounded(kept_a, rule.value_dtype)
        back_w = seen_w * weight_keep if rule.backward_weight else seen_w
        ctx.layer, ctx.absolute = layer, NOW.moment.absolute
        b = rounded(b, autocast) if b is not None else w.new_zeros(w.shape[0])
        if ctx.absolute:
            used_a, used_w, kept_a, back_w, b = (
                x.abs() for x in (used_a, used_w, kept_a, back_w, b)
            )
        ctx.save_for_backward(kept_a, back_w, w, weight_keep, t)
        return layer.op(used_a, used_w) + b.view(-1, *[1] * layer.spatial)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        kept_a, back_w, w, weight_keep, t = ctx.saved_tensors
        layer, rule = ctx.layer, ctx.layer.rule
        spatial = layer.spatial
        g = g.abs() if ctx.absolute else g
        channel = g.dim() - 1 - spatial
        db = _summed(g.movedim(channel, -1).reshape(-1, w.shape[0]))
        if rule.gradient_density != 1:
            groups = activation_groups(g.dim(), spatial, rule.gradient_selector)
            g = g * (g.abs() >= threshold(g.abs(), rule.gradient_density, groups))
        with torch.enable_grad():
            kept_a, back_w = kept_a.detach().requires_grad_(), back_w.detach().requires_grad_()
            dx, dw = torch.autograd.grad(layer.op(kept_a, back_w), (kept_a, back_w), g)
        dt = None
        if rule.weight_selector == "learned":
            q = (w.abs() - t).abs()
            slope = (2 - 4 * q).clamp(min=0.4) * (q <= 1)  # long-tailed: 2 - 4q up to 0.4, then 0.4
            through = dw * slope
            dt = -(through * w).sum(list(range(1, w.dim())), keepdim=True)
            dw = dw * weight_keep + through * w.abs()
        elif rule.active_only:
            dw = dw * weight_keep
        wants = ctx.needs_input_grad
        return (
            dx if wants[0] else None,
            dw if wants[1] else None,
            db if wants[2] else None,
            dt if wants[3] else None,
            *[None] * 4,
        )


def _summed(rows: Tensor) -> Tensor:
    """The sum of all rows; in single precision row by row, as PyTorch's convolutions do it.

    At density 1 swatfx does as eager does, bit for bit, and so rounds no better.
    """
    if rows.dtype is torch.float64:
        return rows.sum(0)
    total = torch.zeros_like(rows[0]) if len(rows) else rows.sum(0)
    for row in rows:
        total += row
    return total


def weight_needs(ctx, t: Tensor | None) -> bool:  # type: ignore[no-untyped-def]
    """Whether a weight gradient will be formed."""
    return bool(ctx.needs_input_grad[1] or (t is not None and ctx.needs_input_grad[3]))


class Magnitude(torch.autograd.Function):
    """Magnitudes, forward and backward."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.abs()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g.abs()


def sum_magnitudes(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor | None:
    """A forward hook for layers that stay torch's: sums of magnitudes, where they are asked for."""
    if not NOW.moment.absolute:
        return None
    sizes = {name: Magnitude.apply(p) for name, p in module.named_parameters()}
    with NOW.at(replace(NOW.moment, absolute=False)):
        y = torch.func.functional_call(module, sizes, tuple(Magnitude.apply(x) for x in args))
    return Magnitude.apply(y)  # type: ignore[no-any-return]


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` rounded to `dtype`, in its own."""
    return x if dtype is None else x.to(torch.float32).to(dtype).to(x.dtype)
