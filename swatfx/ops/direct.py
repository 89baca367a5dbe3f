"""One trip through the dispatcher a call, where nothing unusual is going on.

A call of an op that `torch.library.custom_op` made goes through the dispatcher twice: to a kernel
that knows of autograd, which dispatches again, below itself, to one that runs the op's function and
looks at what it gave. On small tensors that is most of the time. Here a kernel for AutogradCPU runs
the function for CPUs at once, if the dispatcher says that it would come next. Whatever else may see
the call (a dispatch mode, a subclass, a functorch transform, a fake, conjugate or functional
tensor, another device) stands in the set of keys that the dispatcher hands over with the call: then
torch's own kernel takes it, as it does where torch.compile watches. What lies above autograd
(autocast, torch functions, the profiler's record of the call) has had its say by then.

Our own Python (leaf modules, backward formulas) calls ops by `call`, which makes no trip at all
where the same keys, asked for beforehand, say that nobody would see it: half of what a trip costs
is to turn some twenty arguments into the dispatcher's values and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._C._dynamo import eval_frame
from torch._library.custom_ops import CustomOpDef

_LIBRARY = torch.library.Library("swatfx", "FRAGMENT")
_KEY = "AutogradCPU"
_PLAIN = DispatchKeySet(DispatchKey.CPU) | DispatchKeySet(DispatchKey.AutogradCPU)
_NOT_COMPILED = eval_frame._FrameExecStrategy(
    eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
)

_is_watched = eval_frame.get_eval_frame_callback
_records = torch.is_grad_enabled
_requires_grad = torch._C._any_requires_grad
_below_autograd = torch._C._AutoDispatchBelowAutograd

# What `call` compares with: the keys of a tensor that is nothing but memory on the host, and those
# that a thread adds to every call where no mode, transform or trace is on.
_HOST = torch._C._dispatch_keys(torch.empty(0, device="cpu"))
_NOBODY = DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)
_KINDS = frozenset((Tensor, torch.nn.Parameter))
_OTHERS = frozenset((bool, int, float, str, type(None), list, tuple, torch.Size, torch.dtype))
_nodes: dict[CustomOpDef, type[torch.autograd.Function] | None] = {}

_keys_of = torch._C._dispatch_keys
_added = torch._C._dispatch_tls_local_include_set
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_functions = torch._C._len_torch_function_stack
_is_profiled = torch._C._autograd._profiler_enabled


def register_direct(op: CustomOpDef) -> None:
    """Let plain calls of `op` on CPUs take the short way.

    The kernel is the one that `op` has when it is called; what it knows of autograd it knows now.
    """
    full = torch.library.get_kernel(op._opoverload, _KEY)
    node = _nodes[op] = _node(op)

    def kernel(keys: DispatchKeySet, *args: Any) -> Any:
        if keys != _PLAIN or _is_watched() is not None:
            return full.call_boxed(keys, *args)
        if _records() and _requires_grad(*args):
            if node is None:
                return full.call_boxed(keys, *args)
            return node.apply(*args)
        with _below_autograd():
            return _function(op)(*args)

    # Else torch.compile, asked to watch what follows a graph break, would begin with this.
    eval_frame.set_code_exec_strategy(kernel.__code__, _NOT_COMPILED)
    _LIBRARY.impl(op._name, kernel, _KEY, with_keyset=True)


def call(op: CustomOpDef, *args: Any) -> Any:
    """`op(*args)`, for an op whose arguments autocast leaves alone.

    Args:
        op: that `register_direct` knows.
        args: all that its schema has, in its types: nothing is converted on the way. Lists hold no
            tensors.
    """
    if torch.compiler.is_compiling() or not _goes_unseen(args):
        return op(*args)
    if _records() and _requires_grad(*args):
        node = _nodes[op]
        return op(*args) if node is None else node.apply(*args)
    with _below_autograd():
        return _function(op)(*args)


def _goes_unseen(args: Sequence[Any]) -> bool:
    """Whether a call with `args` would reach `kernel` above by nothing that takes note of it."""
    if (
        _is_watched() is not None
        or _added() != _NOBODY
        or _functions()
        or _is_profiled()
        or _is_excluded(DispatchKey.AutogradFunctionality)
    ):
        return False
    for one in args:
        kind = type(one)
        if kind in _OTHERS:
            continue
        if kind not in _KINDS or _keys_of(one) != _HOST:
            return False
    return True


def _function(op: CustomOpDef) -> Any:
    """The kernel of `op` on CPUs, without the guard against torch.compile: that does not watch."""
    functions = op._backend_fns
    guarded = functions.get("cpu") or functions[None]
    return getattr(guarded, "__wrapped__", guarded)


def _node(op: CustomOpDef) -> type[torch.autograd.Function] | None:
    """What autograd records of a call; None where `op` has lists of tensors, or no backward."""
    arguments = op._opoverload._schema.arguments
    defaults = tuple(a.default_value for a in arguments)
    formula = op._backward_fn
    lists = [str(a.type) for a in arguments if str(a.type).startswith("List")]
    if formula is None or any("Tensor" in one for one in lists):
        return None

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            result = _function(op)(*args)
            if op._setup_context_fn is not None:
                # The dispatcher leaves out what is at its default, from the end.
                op._setup_context_fn(ctx, (*args, *defaults[len(args) :]), result)
        return result

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return formula(ctx, *grads)

    # By the name that it has in torch's own.
    name = f"GeneratedBackwardFor_{op._namespace}_{op._name}_{op._opoverload._overloadname}"
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)
