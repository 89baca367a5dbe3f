"""The short way to a kernel: taken by plain calls alone, and with the results of the long one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from swatfx import ops
from swatfx.errors import SwatError
from swatfx.ops import direct
from swatfx.ops.calls import ConvCall, NormCall

CONV = ConvCall((1, 1), (1, 1), (1, 1), 1, layout="batch_innermost").options
NORM = NormCall(True, 0.1, 1e-5, True).options


class Watching(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that runs ops on what it wraps."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, requires_grad=inner.requires_grad)
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        inner = [a.inner if isinstance(a, Wrapped) else a for a in args]
        out = func(*inner, **(kwargs or {}))
        return tuple(map(cls, out)) if isinstance(out, tuple) else cls(out)


def _conv(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    kept = ops.pack(x.detach(), torch.tensor(0.5), 2, "nchw", x.dtype, "batch_innermost")
    out: Tensor = ops.conv(x, w, b, torch.tensor(0.1), kept, *CONV)
    return out


def _inputs(grads: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = (2, 16, 4, 4), (16, 16, 3, 3), (16,)
    found = [torch.randn(shape, generator=made) for shape in shapes]
    return [x.requires_grad_(wanted) for x, wanted in zip(found, grads, strict=True)]


def _is_short(y: Tensor) -> bool:
    """Whether the node behind `y` is of the short way."""
    node: Any = y.grad_fn
    return bool(node._forward_cls.__module__ == direct.__name__)


def _gradients(wanted: tuple[bool, ...], watched: bool) -> list[Tensor | None]:
    inputs = _inputs(wanted)
    with Watching() if watched else nullcontext():
        y = _conv(*inputs)
        assert _is_short(y) is not watched
        y.square().sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize(
    "wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str
)
def test_both_ways_give_the_same(wanted: tuple[int, ...]) -> None:
    flags = tuple(map(bool, wanted))
    for one, other in zip(_gradients(flags, False), _gradients(flags, True), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other) and one.stride() == other.stride()


def _relu(x: Tensor) -> Tensor:
    y: Tensor = direct.call(ops.relu, x)[0]
    return y


def test_a_call_of_our_own_gives_what_the_op_gives() -> None:
    ours, theirs = (torch.randn(3, 4, generator=_seeded()).requires_grad_() for _ in range(2))
    y, z = _relu(ours), ops.relu(theirs)[0]
    assert _is_short(y) and torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad) and ours.grad.any()
    with torch.no_grad():
        assert _relu(ours).grad_fn is None
    with torch._C._AutoDispatchBelowAutograd():  # as inside of an op: nothing is recorded
        assert _relu(ours).grad_fn is None


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_call_of_our_own_is_seen_by_whatever_watches() -> None:
    x = torch.randn(3, 4)
    with Watching() as mode:
        _relu(x)
    assert "swatfx.relu.default" in mode.seen
    with Listening() as functions:
        _relu(x)
    assert any("swatfx.relu" in name for name in functions.seen)
    Wrapped.seen.clear()
    assert type(_relu(Wrapped(x))) is Wrapped and Wrapped.seen == ["swatfx.relu.default"]
    with FakeTensorMode() as fake:
        assert isinstance(_relu(fake.from_tensor(x)), FakeTensor)
    with pytest.warns(UserWarning, match="batching rule for swatfx::relu"):
        assert torch.equal(torch.func.vmap(_relu)(x), x.relu())
    assert torch.equal(torch.func.functionalize(_relu)(x), x.relu())
    assert torch.equal(_relu(torch._neg_view(-x)), x.relu())
    with torch.inference_mode():
        assert _relu(x).is_inference()
    assert _relu(x.to("meta")).is_meta


@pytest.mark.usefixtures("_compiles")
def test_a_call_of_our_own_is_in_a_compiled_graph() -> None:
    targets: list[str] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(_relu, backend=backend, fullgraph=True)(x), x.relu())
    assert any("swatfx.relu" in name for name in targets), targets


def test_options_of_a_record() -> None:
    given = ((1, 1), (1, 1), (1, 1), 1)
    made, plain = ConvCall.of(given), ConvCall(*given)
    assert made == plain and made.options == plain.options and hash(made) == hash(plain)
    assert ConvCall.of(CONV) == ConvCall(*CONV)


def test_every_op_has_it() -> None:
    for name in ops.__all__:
        key = "AutogradCPU"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"swatfx::{name}", key), name


def test_a_mode_sees_ops_and_their_backward() -> None:
    x, w, b = _inputs()
    with Watching() as mode:
        y = _conv(x, w, b)
        y.sum().backward()
    seen = [name for name in mode.seen if name.startswith("swatfx")]
    assert seen == ["swatfx.pack.default", "swatfx.conv.default", "swatfx.conv_backward.default"]
    y = _conv(x, w, b)  # what was recorded before the mode was there, too
    with Watching() as mode:
        y.sum().backward()
    assert "swatfx.conv_backward.default" in mode.seen


def test_a_function_mode_sees_ops() -> None:
    with Listening() as mode:
        _conv(*_inputs())
    assert any("swatfx.conv" in name for name in mode.seen)


def test_a_subclass_sees_ops_and_their_backward() -> None:
    Wrapped.seen.clear()
    x = Wrapped(torch.randn(3, 4).requires_grad_())
    y, _ = ops.relu(x)
    assert type(y) is Wrapped and not _is_short(y)
    y.sum().backward()
    assert {"swatfx.relu.default", "swatfx.relu_backward.default"} <= set(Wrapped.seen)


def test_fake_tensors_stay_fake() -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(3, 4).requires_grad_())
        y, bits = ops.relu(x)
        assert isinstance(y, FakeTensor) and isinstance(bits, FakeTensor) and not _is_short(y)


def test_lazy_conjugates_and_functional_tensors_go_the_long_way() -> None:
    x = torch.randn(3, 4)
    plain, _ = ops.relu(x)
    found = torch.func.functionalize(lambda a: ops.relu(a)[0])(x)
    assert torch.equal(found, plain)
    negative = torch._neg_view(-x)
    assert torch.equal(ops.relu(negative)[0], plain)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_what_a_loop_gives() -> None:
    x = torch.randn(5, 3, 4)
    found = torch.func.vmap(lambda a: ops.relu(a)[0])(x)
    assert torch.equal(found, x.relu())


def test_transforms_that_differentiate_are_refused_as_ever() -> None:
    with pytest.raises(RuntimeError, match="setup_context|functorch|torch.func"):
        torch.func.grad(lambda a: ops.relu(a)[0].sum())(torch.randn(3, 4))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(context: Any) -> None:
    with context():
        y = _conv(*_inputs())
    assert y.grad_fn is None and not y.requires_grad
    assert y.is_inference() is (context is torch.inference_mode)
    assert torch.equal(y, _conv(*_inputs()))


@pytest.mark.filterwarnings("ignore:.*(Anomaly Detection|Error detected in)")
def test_anomaly_mode_names_the_op() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        y, _ = ops.relu(x)
        with pytest.raises(RuntimeError, match="GeneratedBackwardFor_swatfx_relu_default"):
            y.backward(torch.full_like(y, torch.nan))


def test_hooks_see_what_is_saved() -> None:
    saved: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    x, w, b = _inputs()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _conv(x, w, b).sum().backward()
    assert any(x.dtype is torch.uint8 for x in saved) and any(x is w for x in saved)
    again = _inputs()
    _conv(*again).sum().backward()
    assert w.grad is not None and again[1].grad is not None
    assert torch.equal(w.grad, again[1].grad)


def test_backward_in_several_threads() -> None:
    def train(found: list[Tensor]) -> None:
        x, w, b = _inputs()
        _conv(x, w, b).square().sum().backward()
        assert w.grad is not None
        found.append(w.grad)

    found: list[Tensor] = []
    threads = [threading.Thread(target=train, args=(found,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(g, found[0]) for g in found)


def test_a_second_derivative_is_refused() -> None:
    x, w, b = _inputs()
    (grad,) = torch.autograd.grad(_conv(x, w, b).square().sum(), x, create_graph=True)
    with pytest.raises(SwatError, match="double backward"):
        grad.sum().backward()


def test_undefined_gradients_and_outputs_without_one() -> None:
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    y, mean, *_ = ops.batch_norm(x, None, weight, None, None, None, *NORM)
    assert y.requires_grad and not mean.requires_grad

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            return None

    Nothing.apply(y).sum().backward()
    assert weight.grad is None and x.grad is None


def test_checkpoints_recompute() -> None:
    plain, again = _inputs(), _inputs()
    _conv(*plain).square().sum().backward()
    checkpoint(lambda *a: _conv(*a), *again, use_reentrant=False).square().sum().backward()
    for one, other in zip(plain, again, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_autocast_casts_before() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = _conv(*_inputs())
    assert y.dtype is torch.bfloat16 and _is_short(y)


def test_a_profiler_sees_calls() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        _conv(*_inputs()).sum().backward()
    names = {event.key for event in run.key_averages()}
    assert {"swatfx::conv", "swatfx::conv_backward"} <= names


def test_a_kernel_that_is_switched_off_is_not_run() -> None:
    calls: list[int] = []
    before = ops.relu._backend_fns["cpu"]

    @ops.relu.register_kernel("cpu")
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        y, bits = before(x)
        return y, bits

    try:
        with ops.relu.set_kernel_enabled("cpu", enabled=False):
            ops.relu(torch.randn(3))
        assert not calls
        ops.relu(torch.randn(3))
        assert calls
    finally:
        ops.relu._backend_fns["cpu"] = before


@pytest.fixture
def _compiles() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiles")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_torch_compile_looks_into_no_kernel() -> None:
    frames: list[str] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        frames.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    @torch.compiler.disable(recursive=False)
    def between(y: Tensor) -> Tensor:
        z: Tensor = ops.relu(y)[0]  # as eager code runs, whose own calls are compiled
        return z

    @torch.compile(backend=backend)
    def run(x: Tensor) -> Tensor:
        return between(x) * 3

    x = torch.randn(3, 4, requires_grad=True)
    z = run(x)
    z.sum().backward()
    assert torch.equal(z, x.relu() * 3)
    assert x.grad is not None and torch.equal(x.grad, (x > 0) * 3.0)
    assert all("mul" in name for name in frames), frames
