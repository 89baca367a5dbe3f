"""Run a copy of the graph on example inputs and write down what each node saw.

Reads the graph; changes nothing: the copy shares parameters but owns its buffers, and random state
is put back. Meta inputs run on fake tensors, so that nothing is computed or allocated, and packed
activations have their planned size; real inputs run for real, and give realised densities.
"""

from __future__ import annotations

import logging
import math
import operator
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from passes.reading.products import Frame, Frames, Product, Watch
from swatfx import meta
from swatfx.compiled import (
    CONV,
    LINEAR,
    Pack,
    Saver,
    SwatModule,
    all_parts,
    private_copy,
    saving,
    split_inputs,
)
from swatfx.errors import InputError, SwatError
from swatfx.ops.layout import laid_out
from swatfx.ops.pack import order_of
from swatfx.tensors import bits, layouts

Key = tuple[str, str]  # (part path, node name)
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass
class Seen:
    """What one node saw.

    Attributes:
        input_shape: of its first tensor argument; of the activation before padding for a layer.
        output_shape: of its result.
        input_requires_grad: whether an input gradient is wanted.
        weight_requires_grad: for a layer, whether a weight gradient is.
        saved: storage -> bytes that autograd keeps on its account: each storage is on one node's,
            the first layer's that keeps it, or else the first node's.
        keep: for a layer, mask of the stored activation, when run for real.
        nonzero: for a layer, where its input is not zero, if masks were asked for.
    """

    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    input_requires_grad: bool = True
    weight_requires_grad: bool = True
    saved: dict[int, int] = field(default_factory=dict)
    keep: Tensor | None = None
    nonzero: Tensor | None = None

    @property
    def saved_bytes(self) -> int:
        """Bytes that are on this node's account."""
        return sum(self.saved.values())


@dataclass
class Run:
    """One observed run.

    Attributes:
        nodes: what each node saw, call by call.
        saved: storage -> bytes kept for backward.
        modules: what modules saw that eager code called.
        products: of matrices, in order, where they were asked for.
        norm_elements: elements that batch norms normalised, likewise.
    """

    nodes: dict[Key, list[Seen]] = field(default_factory=dict)
    saved: dict[int, int] = field(default_factory=dict)
    modules: dict[Frame, list[Seen]] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    norm_elements: int = 0

    @property
    def saved_bytes(self) -> int:
        """Bytes of all distinct storages kept for backward, parameters and buffers excluded."""
        return sum(self.saved.values())


def observe_run(
    gm: SwatModule,
    example_inputs: Any,
    *,
    as_dense: bool,
    masks: bool = False,
    products: bool = False,
) -> Run:
    """Run a training forward on a copy of `gm`.

    Args:
        gm: the compiled model.
        example_inputs: positional inputs, or a dict by name; on the meta device: nothing is
            computed.
        as_dense: run every layer as the dense layer it was.
        masks: also keep where each layer's input is not zero (real inputs only).
        products: also note the products of matrices, and the elements of batch norms.

    Raises:
        InputError: the inputs do not fit, or the model cannot run on meta tensors.
    """
    twin = private_copy(gm)
    twin.train()
    twin.swat.clock.optimizer_wanted_by = None
    if as_dense:
        for _, part in all_parts(twin):
            part.__dict__["eager_attention"] = None
    inputs = split_inputs(example_inputs)
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    fake = any(x.is_meta for x in tensors) or any(p.is_meta for p in gm.parameters())
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    if mode is not None:
        _make_fake(twin, mode)
        inputs = pytree.tree_map_only(Tensor, lambda x: _fake_like(mode, x), inputs)
    else:  # the model may work in place on its inputs
        inputs = pytree.tree_map_only(
            Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), inputs
        )
    run = Run()
    observer = _Run(twin, run, as_dense, fake, masks and not fake)
    watch = Watch(twin, observer.frames) if products else None
    try:
        with ExitStack() as inside:
            inside.enter_context(torch.enable_grad())
            inside.enter_context(_random_state_kept(tensors))
            inside.enter_context(_quiet())
            inside.enter_context(observer.hooked())
            inside.enter_context(saving(twin.eager_attention))
            for each in (mode, watch):
                if each is not None:
                    inside.enter_context(each)
            output = observer.root(*inputs[0], **inputs[1])
    except SwatError:
        raise
    except Exception as error:
        raise InputError(
            f"the model does not run on the example inputs: {_first_line(error)}",
            value=_shapes(inputs),
            remedy=observer.remedy,
        ) from error
    del output
    observer.settle()
    if watch is not None:
        run.products, run.norm_elements = watch.products, watch.norm_elements
    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of what failed on fake tensors: our error tells it, in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _random_state_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    state = random.getstate()
    devices = {x.device.index for x in tensors if x.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(state)


def _fake_like(mode: FakeTensorMode, x: Tensor) -> Tensor:
    device = "cpu" if x.is_meta else x.device
    with mode:
        result = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return result.requires_grad_(x.requires_grad)


def _make_fake(twin: nn.Module, mode: FakeTensorMode) -> None:
    fakes: dict[int, Tensor] = {}
    for module in twin.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = _fake_like(mode, tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                table[name] = fakes[id(tensor)]  # type: ignore[assignment]


class _Saved:
    """A tensor that autograd saved, until the run is over."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Run:
    """Interprets root and parts of one copy into one record."""

    def __init__(self, gm: SwatModule, run: Run, as_dense: bool, fake: bool, masks: bool) -> None:
        self.run = run
        self.masks = masks
        self.as_dense = as_dense
        self.fake = fake
        self.remedy = "check the shapes and dtypes of the example inputs"
        if fake:
            self.remedy += "; a model whose shapes depend on data wants real inputs, not meta"
        self.current: list[Seen] = []
        self.layers: list[Seen] = []
        self.others: list[Seen] = []
        self.in_layer = False
        self.frames: list[Frame] = []
        self.calling: nn.Module | None = None
        self.modules = Frames(gm, self._enter, self._leave)
        own = [t.untyped_storage() for t in (*gm.parameters(), *gm.buffers())]
        self.skip = {storage._cdata for storage in own}
        # A freed storage's place may be given to another; held ones (which lead to no result) not.
        self.alive = own
        runs = {id(part): _Interpreter(part, prefix, self) for prefix, part in all_parts(gm)}
        self.root: Callable[..., Any] = _caller(gm, runs)
        for part in gm.parts.values():
            part.__dict__["forward"] = _caller(part, runs)

    def settle(self) -> None:
        """Put every storage on one account, and let go of them."""
        self.alive.clear()
        settled: set[int] = set()
        for seen in (*self.layers, *self.others):
            seen.saved = {k: size for k, size in seen.saved.items() if k not in settled}
            settled.update(seen.saved)

    def _enter(self, module: nn.Module, frame: Frame) -> bool:
        """Whether `module` gets an account of its own: eager code calls it, no node of a graph."""
        if self.in_layer or module is self.calling:
            self.calling = None
            return False
        seen = Seen()
        self.others.append(seen)
        self.current.append(seen)
        self.frames.append(frame)
        self.run.modules.setdefault(frame, []).append(seen)
        return True

    def _leave(self) -> None:
        self.current.pop()
        self.frames.pop()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch what autograd saves, and which modules eager code calls."""
        # Autograd holds these hooks and what they pack in C++, where the garbage collector does not
        # look. So nothing may lead from there back to a result: not `self`, whose interpreters hold
        # values, nor, after the run, a saved tensor, which may be the result of what saved it.
        skip, run, current, alive = self.skip, self.run, self.current, self.alive
        packed: weakref.WeakSet[_Saved] = weakref.WeakSet()

        def saved(tensor: Tensor) -> _Saved:
            storage = tensor.untyped_storage()
            if storage._cdata not in skip and not isinstance(tensor, nn.Parameter):
                alive.append(storage)
                run.saved[storage._cdata] = storage.nbytes()
                if current:
                    current[-1].saved[storage._cdata] = storage.nbytes()
            holder = _Saved(tensor)
            packed.add(holder)
            return holder

        hooks = torch.autograd.graph.saved_tensors_hooks(saved, operator.attrgetter("tensor"))
        try:
            with hooks, self.modules.hooked():
                yield
        finally:
            for holder in list(packed):
                del holder.tensor


def _caller(gm: SwatModule, runs: dict[int, _Interpreter]) -> Callable[..., Any]:
    """Runs the graph that a call of `gm` is for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        ways = gm.ways
        if ways is None:
            return runs[id(gm)].call(*args, **kwargs)
        chosen = ways.choose(args, kwargs)
        if chosen is not None:
            graph, inputs = chosen
            return runs[id(gm if graph is None else graph)].call(*inputs)
        if ways.fallback is not None:
            return runs[id(ways.fallback)].call(*args, **kwargs)
        return gm.call_eagerly(args, kwargs)

    return call


class _Interpreter(fx.Interpreter):
    """Runs one graph node by node, recording."""

    def __init__(self, gm: fx.GraphModule, prefix: str, owner: _Run) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # it would add lines to our errors
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.prefix = prefix
        self.owner = owner

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the graph's own signature."""
        rest, named = list(args), dict(kwargs)
        env: dict[fx.Node, Any] = {}
        for node in self.placeholders:
            name = str(node.target)
            if name.startswith("**"):
                env[node], named = named, {}
            elif name.startswith("*"):
                env[node], rest = tuple(rest), []
            elif rest:
                env[node] = rest.pop(0)
            elif name in named or node.args:
                env[node] = named.pop(name, node.args[0] if node.args else None)
            else:
                raise TypeError(f"forward misses its argument {name!r}")
        if rest or named:
            raise TypeError(f"forward takes {len(env)} arguments, not {len(args) + len(kwargs)}")
        return self.run(initial_env=env, enable_io_processing=False)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A graph holds its literals as immutable lists; run as code, they are lists to work on.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_thawed(a) for a in args), {k: _thawed(v) for k, v in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output") or self.owner.in_layer:
            return super().run_node(n)
        seen = Seen()
        accounts = self.owner.others if meta.read(n).plan is None else self.owner.layers
        accounts.append(seen)
        self.owner.current.append(seen)
        self.owner.frames.append(Frame((self.prefix, n.name)))
        called = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        self.owner.calling = called
        try:
            result = self._execute(n)
        except SwatError:
            raise
        except Exception as error:
            plan = meta.read(n).plan
            raise InputError(
                f"the example inputs do not fit: {_first_line(error)}",
                layer=plan.name if plan else f"node {n.name}",
                value=_shapes(self.fetch_args_kwargs_from_env(n)),
                remedy=self.owner.remedy,
            ) from error
        finally:
            self.owner.current.pop()
            self.owner.frames.pop()
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        first = next((a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)), None)
        if first is not None:
            seen.input_shape = tuple(first.shape)
            seen.input_requires_grad = first.requires_grad
        if isinstance(result, Tensor):
            seen.output_shape = tuple(result.shape)
        weight = (
            getattr(called, "weight", None) if called is not None else next(iter(args[1:2]), None)
        )
        seen.weight_requires_grad = not isinstance(weight, Tensor) or weight.requires_grad
        if n.op == "call_function" and n.target in (CONV, LINEAR):
            self._record_layer(n, seen, args)
        elif self.owner.masks and first is not None and meta.read(n).plan is not None:
            seen.nonzero = first.detach() != 0
        self.owner.run.nodes.setdefault((self.prefix, n.name), []).append(seen)
        return result

    def _execute(self, n: fx.Node) -> Any:
        target = str(n.target)
        if n.op == "call_module" and target.startswith("swat.") and target != "swat.eager_root":
            return self._run_state(n)
        if self.owner.as_dense and n.op == "call_function" and n.target in (CONV, LINEAR):
            args, _ = self.fetch_args_kwargs_from_env(n)
            if n.target is LINEAR:
                return F.linear(*args[:3])
            return _CONV[args[1].dim() - 2](*args[:3], *args[5:9])
        if self.owner.as_dense and n.target is laid_out:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        # A layer that stays a module may have a part of its own: one call is counted once.
        self.owner.in_layer = n.op == "call_module" and meta.read(n).plan is not None
        try:
            return super().run_node(n)
        finally:
            self.owner.in_layer = False

    def _run_state(self, n: fx.Node) -> Any:
        module = self.module.get_submodule(str(n.target))
        if isinstance(module, Saver):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            run = module.plain if self.owner.as_dense else module
            return run(*args, **kwargs)
        if self.owner.as_dense:
            return None
        if not self.owner.fake:
            return super().run_node(n)
        if not isinstance(module, Pack):
            # Of a threshold, only its shape matters here; training hands out a copy.
            threshold = getattr(module, "threshold", None)
            return None if threshold is None else torch.empty_like(threshold)
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, _, *weights = args
        if not any(w.requires_grad for w in weights):
            return None
        plans = [meta.read(user).plan for user in n.users]
        density = next(p.activation_density for p in plans if p is not None)
        itemsize = module.stored_dtype(x).itemsize
        size = bits.header_bytes(x.numel()) + density.count(x.numel()) * itemsize
        return torch.empty(size, dtype=torch.uint8, device=x.device)

    def _record_layer(self, n: fx.Node, seen: Seen, args: Any) -> None:
        call = meta.read(n).call
        pad = call.pad if call is not None else ()
        shape = list(seen.input_shape)
        inside = [slice(None)] * len(shape)
        for i in range(len(pad) // 2):
            shape[-1 - i] -= pad[2 * i] + pad[2 * i + 1]
            inside[-1 - i] = slice(pad[2 * i], pad[2 * i] + shape[-1 - i])
        seen.input_shape = tuple(shape)
        if self.owner.masks:
            seen.nonzero = args[0].detach()[tuple(inside)] != 0
        kept = args[4]
        if kept is not None and not isinstance(kept, FakeTensor):
            elements = math.prod(shape)
            mask = bits.bits_to_mask(kept.view(-1)[: (elements + 7) // 8], elements)
            seen.keep = layouts.from_flat(mask, shape, order_of(kept))


def _thawed(value: Any) -> Any:
    if isinstance(value, immutable_list):
        return [_thawed(v) for v in value]
    if isinstance(value, immutable_dict):
        return {k: _thawed(v) for k, v in value.items()}
    return tuple(_thawed(v) for v in value) if type(value) is tuple else value


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _shapes(values: Any) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
