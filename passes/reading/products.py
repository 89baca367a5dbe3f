"""Watch a run for products of matrices and batch norms, wherever they are formed.

Reads the aten ops of a run, which is below functions, modules, TorchScript and eager Python alike;
writes down for each product who formed it: the graph's node, or the module of eager code, that was
innermost. Also which weights a product's sides come from, through views, casts and whatever else
computes them from parameters and buffers alone. Changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from swatfx.products import Convolution, Values, is_batch_norm, is_product, terms_of

Key = tuple[str, str]  # (part path, node name)
Names = frozenset[str]


@dataclass(frozen=True)
class Frame:
    """Who runs: a node of a graph, or a module that eager code called.

    Attributes:
        node: (part path, node name); None for a module.
        path: of the module; "" for a node.
        kind: the module's class in lower case if torch wrote it, else "".
    """

    node: Key | None = None
    path: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Product:
    """One product that a run formed.

    Attributes:
        frame: who formed it.
        op: the aten op.
        macs: of forward.
        left: names of the parameters and buffers that one side is computed from, if from nothing
            else; empty for an activation.
        right: likewise.
        wants: whether autograd wants the gradient of the left and of the right side.
        shapes: of left, right and result; () where a side is not one tensor.
        convolution: how it was called, if it is one.
    """

    frame: Frame
    op: str
    macs: int
    left: Names
    right: Names
    wants: tuple[bool, bool]
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    convolution: Convolution | None


class Watch(TorchDispatchMode):
    """Notes the products that are formed while it is entered.

    Attributes:
        products: in order.
        norm_elements: elements that batch norms normalised.
        frames: who runs, innermost last; the caller keeps it up to date.
    """

    supports_higher_order_operators = True

    def __init__(self, owner: nn.Module, frames: Sequence[Frame]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []
        self.norm_elements = 0
        self.frames = frames
        self._sources: dict[int, Names] = {}
        self._alive: list[Tensor] = []  # else their storages' identities would be given out anew
        for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
            key = _storage(tensor)
            if key is not None and not name.startswith("swat."):
                self._sources.setdefault(key, frozenset({name}))
        self._roots = set(self._sources)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if not is_product(func) and _decomposes(func):
            with self:  # as without autograd, which takes ops like `linear` apart before
                result = func.decompose(*args, **options)
            if result is not NotImplemented:
                return result
        out = func(*args, **options)
        if is_product(func):
            self._note(func, args, options, out)
        if is_batch_norm(func):
            self.norm_elements += args[0].numel()
        self._trace(_tensors((args, options)), _tensors(out))
        return out

    def _note(self, func: Any, args: Sequence[Any], options: dict[str, Any], out: Any) -> None:
        for term in terms_of(func, args, options, out):
            result = next(iter(_tensors(out)), None)
            self.products.append(
                Product(
                    self.frames[-1] if self.frames else Frame(),
                    func.__name__.split(".")[0],
                    term.macs,
                    self._names(term.left),
                    self._names(term.right),
                    (self._wanted(term.left), self._wanted(term.right)),
                    (_shape(term.left), _shape(term.right), _shape([result])),
                    term.convolution,
                )
            )

    def _names(self, side: Values) -> Names:
        """The weights that a side is computed from; none where an activation is among them."""
        found: set[str] = set()
        for tensor in side:
            names = None if tensor is None else self._sources.get(_storage(tensor) or 0)
            if names is None:
                return frozenset()
            found |= names
        return frozenset(found)

    def _wanted(self, side: Values) -> bool:
        if torch.is_grad_enabled():
            return any(x is None or x.requires_grad for x in side)
        if not _in_own_function():
            return False
        if self._names(side):
            return any(x is not None and x.requires_grad for x in side)
        return any(x is None or x.is_floating_point() for x in side)

    def _trace(self, given: list[Tensor], results: list[Tensor]) -> None:
        """What is computed from weights alone is a weight; constants change nothing in that."""
        known = [self._sources.get(_storage(x) or 0) for x in given]
        names: Names | None = None
        if all(n is not None for n in known):
            names = frozenset().union(*(n for n in known if n is not None))
        for x in results:
            key = _storage(x)
            if key is None or key in self._roots:
                continue
            if names is None:
                self._sources.pop(key, None)
            else:
                if key not in self._sources:
                    self._alive.append(x)
                self._sources[key] = names | self._sources.get(key, frozenset())


@lru_cache(maxsize=4096)
def _decomposes(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    dispatches = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(dispatches(func.name(), "CompositeImplicitAutograd"))


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int | None:
    """Identity of the storage; None for a sparse tensor, which has several."""
    return x.untyped_storage()._cdata if x.layout is torch.strided else None


def _in_own_function() -> bool:
    """Whether the forward of an autograd function runs, as of checkpointing: it has no gradients
    while it runs, and has them afterwards.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            first = frame.f_code.co_varnames[:1]
            if first and isinstance(frame.f_locals.get(first[0]), FunctionCtx):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _shape(side: Sequence[Tensor | None]) -> tuple[int, ...]:
    only = side[0] if len(side) == 1 else None
    return () if only is None else tuple(only.shape)


class Frames:
    """Tells when eager code enters and leaves a module of `owner`.

    By hooks on all modules: those on a module itself are seen by whoever looks there. Modules of
    others, as other threads may call, are left alone.
    """

    def __init__(
        self,
        owner: nn.Module,
        enter: Callable[[nn.Module, Frame], bool],
        leave: Callable[[], None],
    ) -> None:
        """`enter` says whether it entered; only then is `leave` called."""
        self.enter, self.leave = enter, leave
        self.known = {
            id(m): Frame(None, path, kind_of(m))
            for path, m in owner.named_modules()
            if path and path.split(".")[0] != "swat"
        }
        self.entered: list[tuple[int, bool]] = []

    def _before(self, module: nn.Module, args: Any) -> None:
        frame = self.known.get(id(module))
        if frame is not None:
            self.entered.append((id(module), self.enter(module, frame)))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) not in self.known:
            return
        while self.entered:  # a module that raised was not left
            which, did = self.entered.pop()
            if did:
                self.leave()
            if which == id(module):
                return

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Tell, inside."""
        handles = [
            nn.modules.module.register_module_forward_pre_hook(self._before),
            nn.modules.module.register_module_forward_hook(self._after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def kind_of(module: nn.Module) -> str:
    """What a row calls a module of torch's own: "batch norm", "lstm", ...; "" for any other."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch norm"
    return type(module).__name__.lower() if type(module).__module__.startswith("torch.nn") else ""
