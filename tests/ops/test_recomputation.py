"""Recomputation below eager code: each call finds the threshold that it used in forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swatfx
from swatfx.ops.recomputed import Forwards, History, key_of
from swatfx.ops.state import CALLS
from tests.nets.period_nets import nudge

torch.set_num_threads(1)
# Reentrant within reentrant: the first pass of the inner one sees inputs without gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
S = 0.75
Run = Callable[..., Tensor]


def plainly(function: Run, *args: Tensor) -> Tensor:
    return function(*args)


def checkpointed(reentrant: bool) -> Run:
    def run(function: Run, *args: Tensor) -> Tensor:
        y: Tensor = checkpoint(function, *args, use_reentrant=reentrant)
        return y

    return run


class Net(nn.Module):
    """Eager code in training and in evaluation, with layers that it calls as `run` says."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.stem = nn.Linear(12, 12)
        self.one = nn.Linear(12, 12, bias=False)
        self.two = nn.Linear(12, 12)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:  # control flow that tracing leaves to Python
            x = x * 1
        return self.head(self.middle(x))

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Twice(Net):
    def middle(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.run(self.one, x)
        return x


class Region(Net):
    """One region, whose layers see inputs that nobody keeps."""

    def block(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.relu(x) * 2) + 1))

    def middle(self, x: Tensor) -> Tensor:
        return self.run(self.block, x)


class SharedTail(Net):
    """One call within a region, one outside, of the same layer."""

    def middle(self, x: Tensor) -> Tensor:
        return self.one(self.run(lambda h: self.one(h).sin(), x))


class Nested(Net):
    def inner(self, x: Tensor) -> Tensor:
        return self.one(torch.sin(x))

    def outer(self, x: Tensor) -> Tensor:
        x = self.run(self.inner, torch.cos(x) * 3)
        return self.run(self.inner, self.two(x))

    def middle(self, x: Tensor) -> Tensor:
        return self.run(self.outer, x)


class Random(Net):
    """The same input twice, through a dropout that the recomputation has to draw again."""

    def block(self, x: Tensor) -> Tensor:
        return self.two(self.drop(self.one(x)))

    def middle(self, x: Tensor) -> Tensor:
        return self.run(self.block, x) + self.run(self.block, x)


class Loop(nn.Module):
    """Python that calls a layer twice, the first time on its own input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if bool(torch.isfinite(x.detach()).all()) else 1):
            x = self.layer(x).sin()
        return x


class Within(Net):
    """A part that hands its very input on to a part below it."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.inner = nn.Sequential(Loop(self.one), self.two)

    def middle(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


NETS: list[type[Net]] = [Twice, Region, SharedTail, Nested, Random, Within]


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 12, generator=generator, dtype=torch.float64)


def train(
    net: type[Net],
    run: Run,
    order: str,
    same: bool,
    steps: int = 6,
    **options: Any,
) -> list[Tensor]:
    """Gradients of `steps` forwards, of which `order` says when each is followed backward.

    "ab" runs two forwards, and backward through the first before the second; "+" one backward
    through the sum of both; "a" a backward after every forward.
    """
    torch.manual_seed(3)
    model = net(run).double()
    sparsity = 0.5 if options.get("weight_selector") == "2:4" else S
    policy = swatfx.swat_u(sparsity, first_dense=False, last_dense=False, **options)
    gm = swatfx.compile(model, policy)
    assert gm.eager and gm.parts
    found: list[Tensor] = []
    together = 1 if order == "a" else 2
    torch.manual_seed(8)
    for step in range(0, steps, together):
        inputs = [batch(0 if same else step + i).requires_grad_() for i in range(together)]
        losses = [gm(x).pow(2).sum() for x in inputs]
        gm.zero_grad()
        for loss in _arranged(losses, order):
            loss.backward()
        found += [x.grad for x in inputs if x.grad is not None]
        found += [p.grad.clone() for p in gm.parameters() if p.grad is not None]
        nudge(gm, step)
    assert len(found) > steps
    return found


def _arranged(losses: Sequence[Tensor], order: str) -> list[Tensor]:
    if order == "+":
        return [sum(losses[1:], losses[0])]
    return list(losses if order in ("a", "ab") else reversed(losses))


def assert_close(found: list[Tensor], expected: list[Tensor], exact: bool) -> None:
    tolerance = 0.0 if exact else 1e-12  # else three gradients are summed in another order
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("period", [1, 3, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "order", ["ab", "+", *(pytest.param(o, marks=pytest.mark.slow) for o in ("a", "ba"))]
)
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_those_without_checkpointing(
    net: type[Net], order: str, period: int, reentrant: bool
) -> None:
    for same, selector in ((False, "nchw"), (True, "random")):
        options = {"period": period, "activation_selector": selector, "weight_selector": selector}
        expected = train(net, plainly, order, same, **options)
        found = train(net, checkpointed(reentrant), order, same, **options)
        assert_close(found, expected, exact=order == "a" and net in (Region, Twice))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("net", [Twice, Nested])
@pytest.mark.parametrize(
    "options",
    [
        {"activation_selector": "chw", "weight_selector": "chw"},
        {"activation_selector": "hw", "weight_selector": "hw"},
        {"weight_selector": "2:4"},
        {"weight_selector": "channel", "update": "active"},
        {"weight_selector": "input-channel"},
    ],
    ids=["chw", "hw", "2:4", "channel", "input-channel"],
)
def test_other_selectors(net: type[Net], options: dict[str, Any], reentrant: bool) -> None:
    for period, order in ((1, "a"), (3, "ab")):
        expected = train(net, plainly, order, False, period=period, **options)
        found = train(net, checkpointed(reentrant), order, False, period=period, **options)
        assert_close(found, expected, exact=False)


class Times(Net):
    """A layer that eager code calls as often as `times` says, each time on other magnitudes."""

    def __init__(self, run: Run, *times: int) -> None:
        super().__init__(run)
        self.times = iter(times) if times else itertools.repeat(2)  # of each forward

    def middle(self, x: Tensor) -> Tensor:
        for call in range(next(self.times)):
            x = self.run(self.one, x * (call + 1))
        return x


def kth(x: Tensor) -> Tensor:
    """The smallest of the quarter that is kept of 60."""
    return x.abs().flatten().sort(descending=True).values[14]


Seen = list[tuple[Tensor, Tensor]]


def watched(net: nn.Module, **options: Any) -> tuple[swatfx.SwatModule, Seen]:
    """(compiled, what the layer's threshold is asked and answers from here on)."""
    torch.manual_seed(0)
    gm = swatfx.compile(net.double(), swatfx.swat_u(S, first_dense=False, **options))
    seen: Seen = []
    module = gm.swat.get_submodule("one.activation_threshold")
    module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))  # type: ignore[arg-type]
    return gm, seen


def taken(seen: Seen) -> Seen:
    found = list(seen)
    seen.clear()
    return found


@pytest.mark.parametrize("run", [plainly, checkpointed(False), checkpointed(True)])
@pytest.mark.parametrize("period", [2, 3])
def test_each_call_of_a_forward_has_its_own_threshold_for_a_period(run: Run, period: int) -> None:
    gm, seen = watched(Times(run), period=period)
    held: list[Tensor] = []
    for step in range(2 * period + 1):
        gm(batch(step)).sum().backward()
        calls, again = seen[:2], seen[2:]
        if step % period == 0:
            held = [kth(x) for x, _ in calls]
            assert held[0] != held[1]
        assert [t for _, t in calls] == held
        # Recomputed last call first, each with what it used.
        assert [t for _, t in again] == ([] if run is plainly else held[::-1])
        seen.clear()
        nudge(gm, step)


def test_a_call_that_no_earlier_forward_had_ranks_its_own_input() -> None:
    gm, seen = watched(Times(plainly, 2, 1, 3, 3, 2), period=5)
    gm(batch(0))
    held = [t for _, t in taken(seen)]
    for step, times in enumerate((1, 3, 3, 2)):
        gm(batch(step + 1))
        calls = taken(seen)
        if len(held) < times:
            held.append(kth(calls[2][0]))
        assert [t for _, t in calls] == held[:times]


def test_calls_beyond_those_with_a_state_rank_their_own_input() -> None:
    gm, seen = watched(Times(plainly, CALLS + 3, CALLS + 3), period=100)
    gm(batch(0))
    held = [t for _, t in taken(seen)]
    gm(batch(1))
    calls = taken(seen)
    assert [t for _, t in calls[:CALLS]] == held[:CALLS]
    assert [t for _, t in calls[CALLS:]] == [kth(x) for x, _ in calls[CALLS:]]
    assert len(calls) == CALLS + 3


def test_thresholds_of_later_calls_are_saved_and_move() -> None:
    gm, seen = watched(Times(plainly), period=3)
    gm(batch(0))
    held = [t for _, t in taken(seen)]
    state = {k: v.clone() for k, v in gm.state_dict().items()}
    other, seen = watched(Times(plainly), period=3)
    other.load_state_dict(state)
    other.to(torch.float64)  # as a move to a device: state goes along
    other(batch(1))
    assert [t for _, t in taken(seen)] == held
    old = {k: v for k, v in state.items() if ".later" not in k}  # of an earlier version
    other, seen = watched(Times(plainly), period=3)
    other.load_state_dict(old)
    other(batch(1))
    (_, first), (x, second) = taken(seen)
    assert first == held[0] and second == kth(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own
@pytest.mark.parametrize("same", [False, True])
def test_a_compiler_keeps_calls_apart(same: bool) -> None:
    class Loop(Net):
        def middle(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return y + self.one(x if same else 3 * y)

    found = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        gm = swatfx.compile(Loop(plainly).double(), swatfx.swat_u(S, first_dense=False, period=2))
        call = gm if backend is None else torch.compile(gm, backend=backend)
        for step in range(3):
            gm.zero_grad()
            call(batch(step)).pow(2).sum().backward()
            found.append([p.grad.clone() for p in gm.parameters() if p.grad is not None])
            nudge(gm, step)
    for eager, compiled in zip(found[:3], found[3:], strict=True):
        assert_close(compiled, eager, exact=False)


def test_a_refresh_by_hand_between_forwards_is_what_the_later_one_used() -> None:
    found = []
    for run in (plainly, checkpointed(False)):
        torch.manual_seed(3)
        gm = swatfx.compile(Region(run).double(), swatfx.swat_u(S, first_dense=False, period=4))
        gm(batch(0)).sum().backward()
        nudge(gm, 0)
        swatfx.refresh(gm)
        gm.zero_grad()
        losses = [gm(batch(i)).pow(2).sum() for i in range(1, 5)]  # the last one is due
        losses[0].backward()
        found.append([p.grad.clone() for p in gm.parameters() if p.grad is not None])
    assert_close(found[1], found[0], exact=True)


def test_gradients_within_forward() -> None:
    """A gradient penalty: backward runs in the middle of a forward."""

    class Penalty(Twice):
        def middle(self, x: Tensor) -> Tensor:
            y = self.run(self.one, x)
            y = y + torch.autograd.grad(y.sum(), x, retain_graph=True)[0].detach()
            return self.run(self.one, y)

    expected = train(Penalty, plainly, "a", False, period=2)
    assert_close(train(Penalty, checkpointed(False), "a", False, period=2), expected, exact=True)


# ---- What tells inputs and calls apart -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 12), (2, 3, 4, 5), (0, 3), (33, 65)])
def test_keys_tell_every_element_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.rand(shape) * 100).to(dtype)
    assert key_of([x]) == key_of([x.clone()])
    for position in range(x.numel()):
        other = x.clone()
        other.view(-1)[position] += 1
        assert key_of([other]) != key_of([x])
    if x.numel():
        assert key_of([x.double() + 1]) != key_of([x])


def test_keys_of_views() -> None:
    base = torch.randn(6, 8, 10)
    views = [base, base.permute(2, 0, 1), base[:, ::2], base[1:, 3:], base[:, :1].expand(6, 5, 10)]
    views += [base.view(-1)[1:], torch.complex(base, base).conj(), base > 0, base.to_sparse()]
    keys = [key_of([view]) for view in views]
    assert len(set(keys)) == len(keys)
    assert keys[1] == key_of([base.clone().permute(2, 0, 1)])


def test_a_call_that_nobody_noted_is_unknown() -> None:
    forwards = Forwards()
    assert forwards.recall("key") is None
    forwards.note("key", (3, 7))
    assert forwards.recall("key") == (3, 7) and forwards.recall("other") is None


def test_history_is_bounded_and_knows_where_it_ends() -> None:
    history = History()
    for iteration in range(100):
        history.refreshed(10 * iteration, torch.tensor(float(iteration)))
    state = history.at(985)
    assert state is not None and state.item() == 98
    assert history.at(3) is None and history.of_only_refresh(5) is None
    history.refreshed(990, torch.tensor(1.0))
    assert history.of_only_refresh(990) is None  # two calls had one each
    large = History()
    for iteration in range(5):
        large.refreshed(iteration, torch.zeros(5000))
    assert large.at(2) is None and large.at(3) is not None
