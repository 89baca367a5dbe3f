"""What is kept for backward once AOTAutograd has partitioned the graph, and that values stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.compiled.module import SwatModule

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
torch.set_num_threads(1)
BACKENDS = ["aot_eager", "aot_eager_default_partitioner"]


def net() -> nn.Module:
    """Average pooling saves nothing of its input's size, and neither does what follows it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def saved_by(model: nn.Module, x: Tensor) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def note(t: Tensor) -> Tensor:
        seen.append((t.dtype, tuple(t.shape)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_bytes_are_saved_and_no_dense_input(backend: str) -> None:
    gm = swatfx.compile(net(), swatfx.swat_u(0.9))
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    saved = saved_by(compiled, x)
    inputs = {(4, 8, 4, 4): 512, (4, 64): 256}  # of the two sparse layers
    assert not {shape for dtype, shape in saved if dtype.is_floating_point} & set(inputs)
    packed = sorted(shape[0] for dtype, shape in saved if dtype == torch.uint8)
    sizes = sorted(n // 8 + 4 * (n - n * 9 // 10) for n in inputs.values())
    assert packed == sizes
    # The same as without AOTAutograd.
    assert packed == sorted(s[0] for d, s in saved_by(gm, x) if d == torch.uint8)
    # And the dense model does save them, which says that the shapes above are the right ones.
    torch._dynamo.reset()
    dense = torch.compile(net(), backend=backend, fullgraph=True)
    assert {shape for _, shape in saved_by(dense, x)} >= set(inputs)


POLICIES = {
    "swat-u": "swat-u:0.9",
    "period": "swat-u:0.8,period=3",
    "erk": "swat-erk:0.9",
    "saw": "saw:0.8",
    "meprop": "meprop:0.8",
    "active": "swat-u:0.8,update=active",
    "activations": "swat-u:0.8,forward_activation=True",
    "chw": "swat-u:0.8,activation_selector=chw,weight_selector=chw",
    "channel": "swat-u:0.8,weight_selector=channel",
    "n:m": "swat-u:0.5,weight_selector=2:4",
    "random": "swat-u:0.8,weight_selector=random,activation_selector=random",
}


def step(model: nn.Module, owner: SwatModule, x: Tensor) -> list[Tensor]:
    owner.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.pow(2).sum().backward()
    assert x.grad is not None
    found = [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in owner.parameters() if p.grad is not None),
    ]
    with torch.no_grad():
        for p in owner.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
    return found


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_values_are_those_of_eager_bit_for_bit(policy: str) -> None:
    model = nn.Sequential(net(), nn.ReLU())
    eager = swatfx.compile(model, policy)
    gm = swatfx.compile(copy.deepcopy(model), policy)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    for seed in range(5):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        pairs = zip(step(eager, eager, x), step(compiled, gm, x), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"step {seed}"
    for name, value in eager.state_dict().items():
        assert torch.equal(gm.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(gm.eval()(x), eager.eval()(x))
        assert torch.equal(compiled(x), eager(x))


def test_one_graph_serves_all_iterations() -> None:
    gm = swatfx.compile(net(), swatfx.swat_u(0.9, period=2))
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(gm, backend=count, fullgraph=True)
    for seed in range(6):
        torch.manual_seed(seed)
        compiled(torch.randn(4, 3, 8, 8)).sum().backward()
        for layer in gm.swat.thresholds():
            layer[1].density.mul_(0.9)  # as SWAT-M does
            layer[1].fraction.zero_()
    assert len(graphs) == 1
