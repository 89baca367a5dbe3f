"""What a traced forward does to tensors that are no proxies, refused where it would be lost.

A write into such a tensor, or into its `.data`, would happen once, at compile time. Arithmetic on
weights that forward found by another way than their names (`self.parameters()`) would be frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from passes.tracing.guards import Refusal, has_proxy

_VIEWS = ("data", "grad", "T", "H", "mT", "mH", "real", "imag")  # attributes that are tensors
_QUESTIONS = frozenset(
    "dim size numel nelement ndimension stride is_floating_point is_complex is_contiguous"
    " element_size storage_offset data_ptr get_device __len__ __hash__ __repr__ __format__"
    " is_signed is_conj is_neg has_names untyped_storage is_storage is_tensor is_same_size"
    " __deepcopy__ is_inference is_pinned is_shared _is_view type".split()
)


class RealTensors(TorchFunctionMode):
    """Refuses what a traced forward does with tensors that are no proxies.

    Args:
        own: identities of the model's parameters and buffers.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own = own
        self._made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, or raise Refusal."""
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        if tensors:
            self._check(func, tensors, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if id(tensor) not in self._own and not any(tensor is t for t in tensors):
                self._made[id(tensor)] = tensor
        return result

    def _check(
        self, func: Callable[..., Any], tensors: list[Tensor], args: Any, kwargs: Any
    ) -> None:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        traced = has_proxy(args) or has_proxy(kwargs)
        if name == "__set__" or name == "__delete__":
            raise Refusal(f"forward sets .{attribute} of a tensor")
        if name == "__get__" and attribute not in _VIEWS or name in _QUESTIONS:
            return
        if _writes(name, kwargs):
            target = kwargs.get("out", args[0] if args else None)
            if isinstance(target, Tensor) and (traced or id(target) not in self._made):
                raise Refusal("forward writes into a tensor that is no result of the graph")
        if not traced:
            for tensor in tensors:
                if id(tensor) in self._own or tensor.requires_grad:
                    raise Refusal("forward computes with weights that it does not reach by name")


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    inplace = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return inplace or operator or name == "__setitem__" or "out" in kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
