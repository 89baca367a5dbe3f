"""Every optimizer of torch.optim in each of its forms, and some that are none of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.nets.small_nets import loss_of

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class SignUpdates(torch.optim.Optimizer):
    """As Lion moves: by signs, here of zeros, too, and through `.data`."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                average = state.setdefault("exp_avg", torch.zeros_like(p))
                p.data.add_(torch.sign(average.lerp(p.grad, 0.1) + 1e-12), alpha=-group["lr"])
                average.lerp_(p.grad, 0.01)


class MovesAfterItsParent(torch.optim.SGD):
    """Calls its parent's step, whose hooks run within its own, and then adds noise to all."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, lr=0.05, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(1e-3)
        return loss


class SkipsNaN(torch.optim.SGD):
    """Leaves a step out by itself where a gradient is not finite."""

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(params, **({"lr": 0.05, "momentum": 0.9} | options))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if any(g is not None and not torch.isfinite(g).all() for g in grads):
            return None
        return super().step(closure)


_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "lr": 1e-3},
    "LBFGS": {"max_iter": 4},
    "Muon": {"lr": 0.02},
}


def forms() -> dict[str, Make]:
    """Name and form -> how to make it; all that this machine's CPU has."""
    # "SparseAdam" wants sparse gradients, which no compiled layer gives: it refuses by itself.
    found: dict[str, Make] = {}
    for name, cls in vars(torch.optim).items():
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
            continue
        if name in ("Optimizer", "SparseAdam"):
            continue
        taken = inspect.signature(cls).parameters
        wanted: list[dict[str, Any]] = [{}]
        wanted += [{form: True} for form in ("foreach", "fused", "nesterov", "amsgrad", "maximize")]
        wanted.append({"line_search_fn": "strong_wolfe"})
        for form in wanted:
            if not form.keys() <= taken.keys() or (name == "LBFGS" and "maximize" in form):
                continue  # maximizing by LBFGS ends in infinity at once
            options = _OPTIONS.get(name, {}) | form

            def make(p: Iterable[nn.Parameter], cls: Any = cls, o: Any = options) -> Any:
                return cls(p, **o)

            try:
                make([nn.Parameter(torch.zeros(2, 2))])
            except (RuntimeError, ValueError):
                continue  # no such form on a CPU
            found[" ".join([name, *form])] = make
    found["sign"] = SignUpdates
    found["subclass"] = MovesAfterItsParent
    return found


FORMS = forms()


def net(bias: bool = False) -> nn.Sequential:
    """(N, 16) -> (N, 8), all weights matrices, as Muon wants them."""
    layers = [nn.Linear(16, 24, bias=bias), nn.ReLU(), nn.Linear(24, 24, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(24, 8, bias=bias))


class Outer(nn.Module):
    """Around `net`, as a LightningModule holds the network that it trains."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.net(x))
        return y


def rows(count: int, seed: int = 0, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 16, generator=generator) for _ in range(count)]


def step_of(
    model: Any, optimizer: torch.optim.Optimizer, x: Tensor, loss: Any = loss_of
) -> float | None:
    """One training step with a closure, as every optimizer takes it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(model(x))
        value.backward()
        return value.detach()

    step: Any = optimizer.step
    if isinstance(optimizer, torch.optim.LBFGS):
        return float(step(closure))
    value = closure()
    step()
    return value.item()
