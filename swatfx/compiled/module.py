"""SwatModule: a GraphModule that keeps the whole module tree of the model it was traced from.

A plain GraphModule copies only what its graph reads, and loses the rest of the state dict. This one
shares the module, parameter and buffer tables of a *mirror* of the model: the same module tree with
the same tensors but its own mode flags. What symbolic tracing cannot follow stays in the mirror as
it was, and the layers below it are reached through *parts*: small SwatModules that stand in for
the `forward` of one module each.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn

from swatfx.compiled.coded import Attention
from swatfx.compiled.eager_attention import saving
from swatfx.compiled.mirror import TABLES, copied_mirror, write_forwards
from swatfx.compiled.parts import all_parts, is_root
from swatfx.compiled.reaching import reach
from swatfx.compiled.state import ActivationThreshold
from swatfx.compiled.swat_state import SwatState
from swatfx.compiled.ways import Ways
from swatfx.errors import CheckpointError, InputError
from swatfx.meta import LayerPlan

_HOOKS = tuple(
    name for name in nn.Module().__dict__ if name.endswith(("_hooks", "_hooks_with_kwargs"))
) + ("_forward_hooks_always_called",)
_GRAPH_STATE = ("_graph", "_code")


class Watch(Protocol):
    """What `swatfx.compiled.changes` knows of one graph."""

    def check(self) -> None:
        """Follow what changed, or raise ChangedModelError."""

    def make_room(self) -> None:
        """Give state the shape that it has for the weights as they are; its values come later."""

    def accept_weights(self, has_values: bool = False) -> None:
        """Take the weights as they are for those that the layers' state belongs to."""

    def mend_copies(self) -> None:
        """Put right what loops over the entries of a copy have done to its state."""

    def note_copies(self) -> None:
        """The state of a copy belongs to the weights as they are now."""


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
        eager_attention: the leaf for calls of torch's attention that no graph has.
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
    eager_attention: Attention | None

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
        self.__dict__["eager_attention"] = None
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
        leaf = self.__dict__["eager_attention"]
        if leaf is None:
            return super().__call__(*args, **kwargs)
        with saving(leaf):
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
        """`follow` in the root and in every part, and bring the state of a copy up to date."""
        for _, part in all_parts(self):
            part.follow()
        self._mend_copies()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch, once what was done to the modules since is followed."""
        self.follow_all()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if "swat" in self._modules:  # before anything is loaded
            self.swat.check_policy(state_dict, f"{prefix}swat.")
        for watch in self._watches():
            watch.make_room()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _mend_copies(self) -> None:
        for watch in self._watches():
            watch.mend_copies()
        for _, threshold in self.swat.thresholds() if "swat" in self._modules else ():
            if isinstance(threshold, ActivationThreshold):
                threshold.settle()

    def accept_weights(self, has_values: bool = False) -> None:
        """`Watch.accept_weights` of the root and of every part."""
        for watch in self._watches():
            watch.accept_weights(has_values)

    def _watches(self) -> Iterator[Watch]:
        for _, part in all_parts(self):
            if part.watch is not None:
                yield part.watch

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = self._kinds()
        self._mend_copies()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.accept_weights()
        for watch in self._watches():
            watch.note_copies()
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
        self._mend_copies()
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
                twin.__dict__[key] = copied_mirror(value, memo)
            elif key not in _GRAPH_STATE:
                twin.__dict__[key] = copy.deepcopy(value, memo)
        twin.graph = copy.deepcopy(self.graph)
        if "swat" in self._modules:
            twin.swat.clock.attached = False  # the optimizer's hook is on the original
            for watch in twin._watches():
                watch.note_copies()
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
    write_forwards(twin for _, twin in pairs)


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


def private_copy(gm: SwatModule) -> SwatModule:
    """A copy that shares the parameters and owns its buffers: to run or rewrite without a trace."""
    return copy.deepcopy(gm, {id(p): p for p in gm.parameters()})


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
