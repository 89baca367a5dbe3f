"""Whether a compiled model does what the model does, bit for bit."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import swatfx
from swatfx.compiled.module import SwatModule

DENSITY_1 = swatfx.swat_u(0.0, first_dense=False)
HALF = swatfx.swat_u(0.5, first_dense=False)


def assert_same(a: Any, b: Any) -> None:
    """Same types all the way down, same bits (NaN equals NaN)."""
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    assert type(a) is type(b) and spec_a == spec_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert type(x) is type(y)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


def loss_of(output: Any) -> torch.Tensor:
    """A scalar that all float outputs with a gradient take part in."""
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
    return torch.stack([x.float().square().mean() for x in tensors if x.requires_grad]).sum()


def seeded(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    return module(*args, **kwargs)


def assert_matches_at_density_1(
    model: nn.Module,
    *args: Any,
    example_inputs: Sequence[Any] | None = None,
    rtol: float = 1e-4,
    **kwargs: Any,
) -> SwatModule:
    """Outputs, gradients, buffers, keys and flags, whichever mode the model was traced in."""
    keys = list(model.state_dict())
    gm = None
    for traced_in_training in (True, False):
        ref, twin = copy.deepcopy(model), copy.deepcopy(model)
        twin.train(traced_in_training)
        flags = [m.training for m in twin.modules()]
        gm = swatfx.compile(twin, DENSITY_1, example_inputs=example_inputs)
        assert [k for k in gm.state_dict() if not k.startswith("swat.")] == keys
        for training in (True, False, True):
            gm.train(training)
            ref.train(training)
            expected, got = seeded(ref, args, kwargs), seeded(gm, args, kwargs)
            assert_same(got, expected)
            if training:
                loss_of(expected).backward()
                loss_of(got).backward()
        for (name, p), q in zip(ref.named_parameters(), twin.named_parameters(), strict=True):
            assert name == q[0] and (p.grad is None) == (q[1].grad is None), name
            if p.grad is not None:
                scale = float(p.grad.abs().max())
                torch.testing.assert_close(q[1].grad, p.grad, rtol=rtol, atol=rtol * scale)
        for (name, b), c in zip(ref.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(b, c), name
        assert [m.training for m in twin.modules()] == flags
    assert gm is not None
    return gm


def train_step(gm: SwatModule, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A step of SGD, then an evaluation; the loss."""
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-3)
    gm.train()
    loss = loss_of(gm(*args, **kwargs))
    loss.backward()
    optimizer.step()
    gm.eval()
    with torch.no_grad():
        gm(*args, **kwargs)
    return loss


def skipped(gm: SwatModule, *args: Any) -> dict[str, str | None]:
    """Layer name -> why it is dense, of every convolution and linear layer in the report."""
    rows = swatfx.report(gm, args).layers
    return {row.name: row.skipped for row in rows if row.kind.startswith(("conv", "linear"))}
