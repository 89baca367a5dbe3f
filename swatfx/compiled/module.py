"""SwatModule: a GraphModule that keeps the whole module tree of the model it was traced from.

A plain GraphModule copies only what its graph reads, and loses the rest of the state dict. This one
shares the module, parameter and buffer tables of a *mirror* of the model: the same module tree with
the same tensors but its own mode flags. What symbolic tracing cannot follow stays in the mirror as
it was, and the layers below it are reached through *parts*: small SwatModules that stand in for
the `forward` of one module each.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import fx, nn

from swatfx.compiled.reaching import reach
from swatfx.compiled.state import SwatState
from swatfx.compiled.ways import Ways
from swatfx.errors import CheckpointError, InputError
from swatfx.meta import LayerPlan

TABLES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_HOOKS = tuple(
    name for name in nn.Module().__dict__ if name.endswith(("_hooks", "_hooks_with_kwargs"))
) + ("_forward_hooks_always_called",)
_CONTAINERS = (dict, list, set, OrderedDict)  # most of a module's attributes: empty hook tables
_GRAPH_STATE = ("_graph", "_code")


def mirror(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer.

    Plain attributes are deep-copied, so that references between modules stay inside the copy;
    whatever cannot be copied (locks, handles) is shared.

    Raises:
        InputError: a lazy module that has not seen an input yet.
    """
    memo: dict[int, Any] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if nn.parameter.is_lazy(tensor):
                raise InputError(
                    "the layer is lazy and has no shape yet",
                    layer=name,
                    remedy="run one forward pass before swatfx.compile",
                )
            if tensor is not None:
                memo[id(tensor)] = tensor
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module
            continue
        twin = module.__class__.__new__(module.__class__)
        memo[id(module)] = twin
        pairs.append((module, twin))
    for module, twin in pairs:
        for key, value in module.__dict__.items():
            twin.__dict__[key] = _copy_attribute(key, value, memo)
    _write_forwards(twin for _, twin in pairs)
    result: nn.Module = memo[id(model)]
    return result


def _write_forwards(copies: Iterable[nn.Module]) -> None:
    """Give copies of fx's GraphModules a forward: fx makes a class for each, without one."""
    for module in copies:
        if isinstance(module, fx.GraphModule):
            module.graph = module.__dict__["_graph"]


def _copy_attribute(key: str, value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if key in ("_parameters", "_buffers"):
        return dict(value)
    if key == "_modules":
        return {name: None if m is None else memo[id(m)] for name, m in value.items()}
    if isinstance(value, torch.Tensor):
        return value  # not registered: shared, since a non-leaf tensor cannot be copied
    if type(value) in _CONTAINERS and not value:
        return memo.setdefault(id(value), type(value)())
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever a user's attribute may raise, sharing it is what is left
        return value


class Watch(Protocol):
    """What `swatfx.compiled.changes` knows of one graph."""

    def check(self) -> None:
        """Follow what changed, or raise ChangedModelError."""

    def make_room(self) -> None:
        """Give state the shape that it has for the weights as they are; its values come later."""

    def accept_weights(self) -> None:
        """Take the weights as they are for those that the layers' state belongs to."""


_LATER = ("attachment", "pass_records", "signature", "swat_owner")  # attributes set after making it


class SwatModule(fx.GraphModule):
    """A GraphModule over the tables of a mirrored module.

    Attributes:
        swat: the clock and the thresholds (a child of the root; parts only refer to it).
        parts: path -> SwatModule that stands in for the forward of the module there.
        ways: which calls the graph is for, and what runs the others; None: it is for all.
        eager: path -> why symbolic tracing left the module there to Python.
        otherwise: likewise, for calls that no graph is for.
        spare: paths of the parts that only such calls come by, or calls that leave arguments out.
        unreached: name -> plan of a conv or linear layer that no graph calls, with its reason.
        called: paths of the modules that the graph called when it was traced.
        iterates: whether the module that was traced runs through all its children.
        watch: looks at every call whether the modules are still those that were compiled.
        mirrored: the mirror, whose methods and attributes this module lends; None in a part.
        copied_from: what this is a deep copy of, and what that is one of, while they live.
    """

    swat: SwatState
    parts: dict[str, SwatModule]
    ways: Ways | None
    eager: dict[str, str]
    otherwise: dict[str, str]
    spare: set[str]
    unreached: dict[str, LayerPlan]
    called: frozenset[str]
    iterates: bool
    watch: Watch | None
    mirrored: nn.Module | None
    copied_from: tuple[weakref.ref[SwatModule], ...]

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(nn.Module(), fx.Graph(), type(root).__name__)
        for table in TABLES:
            self.__dict__[table] = root.__dict__[table]
        self.training = root.training
        self.__dict__["parts"] = {}
        self.__dict__["ways"] = None
        self.__dict__["eager"] = {}
        self.__dict__["otherwise"] = {}
        self.__dict__["spare"] = set()
        self.__dict__["lends"] = False
        self.__dict__["unreached"] = {}
        self.__dict__["mirrored"] = None
        self.__dict__["called"] = frozenset()
        self.__dict__["iterates"] = False
        self.__dict__["watch"] = None
        self.__dict__["copied_from"] = ()
        self.__dict__["choose_kernels"] = None  # set by compile: called where the model was moved
        self._refuse_names()
        self.graph = graph

    def _refuse_names(self) -> None:
        """Raise InputError where a name of the model's hides one of this module's own."""
        for table in ("_modules", "_parameters", "_buffers"):
            for name in self.__dict__[table]:
                if name in self.__dict__ or name in _LATER or hasattr(SwatModule, name):
                    raise InputError(
                        f"the model has a child, parameter or buffer named {name!r}, as a compiled"
                        " model has itself",
                        remedy="rename it, or compile a module that holds the model as its child",
                    )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, once what was done to its modules since is followed."""
        if not torch.compiler.is_compiling():
            self.follow()
        return super().__call__(*args, **kwargs)

    @property
    def __code__(self) -> types.CodeType:
        """That of `forward`: torch.compile asks it of what stands for a GraphModule's forward."""
        code: types.CodeType = type(self).forward.__code__
        return code

    def follow(self) -> None:
        """Let another weight, or another plain layer in its place, have state of its own.

        Raises:
            ChangedModelError: something else was done to a module whose call the graph stands for.
        """
        watch = self.__dict__["watch"]
        if watch is not None:
            watch.check()

    def recompile(self) -> Any:
        """As in fx; calls that the graph is not for go another way."""
        code = super().recompile()
        cls: Any = type(self)
        if self.__dict__.get("ways") is not None:
            cls.forward = _dispatching(cls.forward)
        if signature := self.__dict__.get("signature"):
            cls.forward.__signature__ = signature
        return code

    def call_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that no graph is for.

        Raises:
            InputError: the model was compiled for other arguments alone.
        """
        ways = self.ways
        assert ways is not None  # else the graph takes every call
        if ways.fallback is not None:
            return ways.fallback.forward(*args, **kwargs)
        owner = self.__dict__.get("swat_owner")
        if owner is not None:
            return type(owner).forward(owner, *args, **kwargs)
        ways.arguments.signature.bind(*args, **kwargs)  # raises what a call of the model raises
        raise InputError(
            "an argument is None, or holds None, that was an input when the model was compiled",
            remedy="give swatfx.compile such arguments as example_inputs",
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.__dict__.get("mirrored") is None or name.startswith("__"):
                raise
        return reach(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        mirrored = self.__dict__.get("mirrored")
        if mirrored is not None and name in mirrored._modules:
            mirrored._modules[name] = self._modules.get(name)

    def train(self, mode: bool = True) -> SwatModule:
        """As in torch; a `train` of the model's own has its say."""
        super().train(mode)
        mirrored = self.__dict__.get("mirrored")
        if mirrored is not None:
            if type(mirrored).train is nn.Module.train:
                mirrored.training = mode
            else:  # it may look at the mode before
                mirrored.train(mode)
        return self

    def adopt_parts(self) -> None:
        """Let every graph see this root's `swat`, and finish those that run Python."""
        for prefix, part in all_parts(self):
            if not is_root(prefix):
                part.__dict__["swat"] = self.swat
        for module in (self, None if self.ways is None else self.ways.fallback):
            if module is not None and "pending_graph" in module.__dict__:
                self.swat.add_module("eager_root", module.__dict__.pop("pending_eager_root"))
                self.swat.train(self.training)
                module.graph = module.__dict__.pop("pending_graph")

    def follow_all(self) -> None:
        """`follow` in the root and in every part."""
        for _, part in all_parts(self):
            part.follow()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch, once what was done to the modules since is followed."""
        self.follow_all()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if "swat" in self._modules:  # before anything is loaded
            self.swat.check_policy(state_dict, f"{prefix}swat.")
        for _, part in all_parts(self):
            if part.watch is not None:
                part.watch.make_room()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = self._kinds()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for _, part in all_parts(self):
            if part.watch is not None:
                part.watch.accept_weights()
        choose = self.__dict__["choose_kernels"]
        if choose is not None and self._kinds() != before:
            choose(self)
        return self

    def _kinds(self) -> set[tuple[torch.dtype, str]]:
        return {(p.dtype, p.device.type) for p in self.parameters()}

    def _replicate_for_data_parallel(self) -> Any:
        raise InputError(
            "nn.DataParallel copies a compiled model at every call, and its state with it",
            remedy="use torch.nn.parallel.DistributedDataParallel, a process a device",
        )

    def share_hooks(self, root: nn.Module) -> None:
        """Let hooks that were registered on the model itself run on this module."""
        for name in _HOOKS:
            if name in root.__dict__:
                self.__dict__[name] = root.__dict__[name]

    def __copy__(self) -> SwatModule:
        raise InputError(
            "a shallow copy of a compiled model would share half of its state",
            value="copy.copy(gm)",
            remedy="use copy.deepcopy(gm), or gm itself",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SwatModule:
        twin = SwatModule.__new__(SwatModule)
        memo[id(self)] = twin
        for module in self.modules():  # old-style norms leave a computed weight: it does not copy
            for value in module.__dict__.values():
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    memo.setdefault(id(value), value.detach().clone())
        _copy_graph_modules([m for m in (self, self.mirrored) if m is not None], memo)
        fx.GraphModule.__init__(twin, nn.Module(), fx.Graph(), self.__class__.__name__)
        for key, value in self.__dict__.items():
            if key == "mirrored" and value is not None:
                twin.__dict__[key] = _copied_mirror(value, memo)
            elif key not in _GRAPH_STATE:
                twin.__dict__[key] = copy.deepcopy(value, memo)
        twin.graph = copy.deepcopy(self.graph)
        if "swat" in self._modules:
            twin.swat.clock.attached = False  # the optimizer's hook is on the original
        twin.__dict__["copied_from"] = (*self.copied_from, weakref.ref(self))
        return twin

    def __reduce__(self) -> Any:
        raise CheckpointError(
            "a compiled model cannot be pickled: fx would trace it anew and lose its plan",
            remedy="use swatfx.save(gm, path) and swatfx.load(path, model)",
        )


def _copy_graph_modules(roots: Sequence[nn.Module], memo: dict[int, Any]) -> None:
    """Copy the fx GraphModules below, whole: fx's own copies lack parts, hooks and other graphs."""
    found = {id(m): m for root in roots for m in root.modules() if isinstance(m, fx.GraphModule)}
    pairs = [
        (module, module.__class__.__new__(module.__class__))
        for module in found.values()
        if not isinstance(module, SwatModule) and id(module) not in memo
    ]
    memo.update({id(module): twin for module, twin in pairs})
    for module, twin in pairs:
        twin.__dict__.update(copy.deepcopy(module.__dict__, memo))
    _write_forwards(twin for _, twin in pairs)


def _copied_mirror(mirrored: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy that shares what cannot be copied, as `mirror` does."""
    if id(mirrored) in memo:
        result: nn.Module = memo[id(mirrored)]
        return result
    twin = mirrored.__class__.__new__(mirrored.__class__)
    memo[id(mirrored)] = twin
    for key, value in mirrored.__dict__.items():
        if key in TABLES:
            twin.__dict__[key] = copy.deepcopy(value, memo)
        else:
            twin.__dict__[key] = _copy_attribute(key, value, memo)
    return twin


def _dispatching(generated: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that runs `generated` on the calls that it is for."""

    def forward(self: SwatModule, *args: Any, **kwargs: Any) -> Any:
        ways = self.__dict__["ways"]
        chosen = ways.choose(args, kwargs)
        if chosen is None:
            return self.call_eagerly(args, kwargs)
        graph, inputs = chosen
        if graph is None:
            return generated(self, *inputs)
        if not torch.compiler.is_compiling():
            graph.follow()
        return graph.forward(*inputs)

    forward.__wrapped__ = generated  # type: ignore[attr-defined]
    return forward


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of the model's forward, unbound."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    bound = inspect.signature(model.forward)
    if "self" in bound.parameters:
        own = own.replace(name="self_")
    first = [own.replace(kind=inspect.Parameter.POSITIONAL_ONLY)]
    return bound.replace(parameters=[*first, *bound.parameters.values()])


def private_copy(gm: SwatModule) -> SwatModule:
    """A copy that shares the parameters and owns its buffers: to run or rewrite without a trace."""
    return copy.deepcopy(gm, {id(p): p for p in gm.parameters()})


def all_parts(gm: SwatModule) -> Iterator[tuple[str, SwatModule]]:
    """(path prefix, graph module) of the root ("") and of every part below eager code.

    The prefix of further graphs, for other calls, ends in their arguments, in parentheses.
    """
    yield "", gm
    ways = gm.ways
    if ways is not None:
        yield from ((str(pattern), graph) for pattern, graph in ways.graphs)
        if ways.fallback is not None:
            yield FALLBACK, ways.fallback
    for path, part in gm.parts.items():
        yield path, part
        if part.ways is not None:
            yield from ((f"{path}{pattern}", graph) for pattern, graph in part.ways.graphs)


FALLBACK = "(...)"


def is_root(prefix: str) -> bool:
    """Whether a graph with this prefix stands in for the whole model."""
    return not prefix or prefix.startswith("(")


def join(prefix: str, name: str) -> str:
    """Path of `name` below `prefix`."""
    path = prefix.partition("(")[0]
    return f"{path}.{name}" if path else name


def relative(prefix: str, path: str) -> str:
    """Inverse of `join`: `path` as seen from `prefix`, if it lies below."""
    above = prefix.partition("(")[0]
    return path.removeprefix(f"{above}.") if above else path


def unwrap(module: nn.Module) -> SwatModule:
    """The compiled model inside DistributedDataParallel or torch.compile wrappers, followed.

    Raises:
        InputError: there is none.
        ChangedModelError: as `SwatModule.follow`.
    """
    inner: Any = module
    while not isinstance(inner, SwatModule):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise InputError(
                "not a compiled model",
                value=type(module).__name__,
                remedy="gm = swatfx.compile(model, policy)",
            )
    inner.follow_all()
    return inner


@contextmanager
def evaluation_mode(*roots: nn.Module) -> Iterator[None]:
    """All below `roots` in evaluation: in training, spectral norm moves on at each use."""
    modules = [m for root in roots for m in root.modules()]
    modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    flags = [m.training for m in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def weight_chain(node: fx.Node) -> dict[fx.Node, bool] | None:
    """The nodes that compute `node` from parameters alone, in graph order; None if inputs do.

    True marks a cast whose target an input decides (`weight.to(x.dtype)`): it changes no value that
    matters here, and stands for what it casts.
    """
    ancestors: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in ancestors:
            ancestors.add(n)
            todo += n.all_input_nodes
    status: dict[fx.Node, bool] = {}
    for n in node.graph.nodes:
        if n not in ancestors or n.op in ("placeholder", "output"):
            continue
        if all(m in status for m in n.all_input_nodes):
            status[n] = False
        elif n.op == "call_method" and n.target in ("to", "type_as") and n.args[0] in status:
            status[n] = True
    if node not in status:
        return None
    needed: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in needed:
            needed.add(n)
            todo += n.all_input_nodes[:1] if status[n] else n.all_input_nodes
    return {n: is_cast for n, is_cast in status.items() if n in needed}


def evaluate(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value, as in evaluation, of a node that depends on parameters alone, or None."""
    if node.op == "get_attr":
        value: Any = gm
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        return value if isinstance(value, torch.Tensor) else None
    chain = weight_chain(node)
    if chain is None:
        return None
    run = fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad(), evaluation_mode(gm, getattr(gm, "swat_owner", gm)):
        for n, is_cast in chain.items():
            run.env[n] = run.env[n.all_input_nodes[0]] if is_cast else run.run_node(n)
    result = run.env[node]
    return result if isinstance(result, torch.Tensor) else None


class EagerRoot(nn.Module):
    """Calls the forward of a root module that symbolic tracing could not follow."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.__dict__["root"] = root  # hidden: its parameters already have their names
        self.__dict__["own_forward"] = root.__dict__.get("forward")

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the original forward in this module's mode."""
        root: nn.Module = self.__dict__["root"]
        root.training = self.training
        own = self.__dict__["own_forward"]
        # fx.Interpreter, which torch.export runs a graph by, hands over [] where it has no kwargs.
        named = dict(kwargs)
        return type(root).forward(root, *args, **named) if own is None else own(*args, **named)
