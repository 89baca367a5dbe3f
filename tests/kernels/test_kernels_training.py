"""Training with sparse kernels: what it learns, torch.compile, autocast, the same bits twice."""

from __future__ import annotations

import copy
import functools
import statistics
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swatfx
from swatfx import datasets, kernels, models
from swatfx.runs.recipes import RECIPES, learning_rate, make_optimizer
from tests.nets.kernel_nets import Separable, chain, chosen, pair, residual
from tests.nets.small_nets import batches, loss_of, snapshot

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="no compiled kernels"),
    pytest.mark.usefixtures("threads_as_before", "fresh_dynamo"),
]


@functools.cache
def digits(
    epochs: int, seed: int, fast: bool, policy: str = "swat-u:0.9"
) -> tuple[list[float], float]:
    """(loss of every step, percent of the test images that are read right)."""
    pytest.importorskip("sklearn")
    data, recipe = datasets.load("digits"), RECIPES["digits"]
    with nullcontext() if fast else kernels.reference_only():
        torch.manual_seed(seed)
        gm = swatfx.compile(models.create("digits/cnn"), policy)
        assert ("sparse" in chosen(gm).values()) == fast
        optimizer = make_optimizer(recipe, gm)
        losses = []
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch, 0.0, epochs)
            for x, y in data.train_batches(64, seed=seed, epoch=epoch, device="cpu"):
                optimizer.zero_grad()
                loss = F.cross_entropy(gm(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        gm.eval()
        with torch.no_grad():
            right = [gm(x).argmax(1) == y for x, y in data.test_batches(256, device="cpu")]
    return losses, 100 * float(torch.cat(right).double().mean())


def test_first_losses_are_the_references() -> None:
    """Later ones drift apart, as those of two orders of summation do."""
    fast, _ = digits(6, 0, True)
    slow, _ = digits(6, 0, False)
    assert fast[0] == pytest.approx(slow[0], rel=1e-5)
    assert fast[:8] == pytest.approx(slow[:8], rel=0.01)
    assert statistics.mean(fast[-20:]) == pytest.approx(statistics.mean(slow[-20:]), abs=0.05)


def test_six_epochs_learn_alike() -> None:
    (_, fast), (_, slow) = digits(6, 0, True), digits(6, 0, False)
    assert min(fast, slow) > 95 and abs(fast - slow) < 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["swat-u:0.9", "swat-u:0.9,period=50", "swat-erk:0.9"])
def test_whole_runs_learn_alike(policy: str) -> None:
    """No further apart than seeds are."""
    fast = [digits(15, seed, True, policy)[1] for seed in range(3)]
    slow = [digits(15, seed, False, policy)[1] for seed in range(3)]
    assert min(*fast, *slow) > 96
    assert abs(statistics.mean(fast) - statistics.mean(slow)) < 1


@pytest.mark.parametrize("build", [chain, residual, Separable])
@pytest.mark.parametrize("batch", [16, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_twice(build: type[nn.Module], batch: int, threads: int) -> None:
    """Of the forward and of the weights after three steps, with as many threads."""
    torch.set_num_threads(threads)
    found = []
    for _ in range(2):
        gm = pair(build, "swat-u:0.8,period=2")[0]
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)
        for x in batches(3, batch):
            optimizer.zero_grad()
            y = gm(x)
            loss_of(y).backward()
            optimizer.step()
        found.append({"output": y.detach(), **snapshot(gm)})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", [chain, residual, Separable])
def test_under_torch_compile(build: type[nn.Module], backend: str) -> None:
    """One graph as people call it, and what it gives without."""
    gm = pair(build)[0]
    twin = copy.deepcopy(gm)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(gm, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (gm, twin)]
    for x in batches(3, 16):
        outputs = []
        for run, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            y = run(x)
            loss_of(y).backward()
            optimizer.step()
            outputs.append(y.detach())
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    exact = backend == "aot_eager"  # inductor sums in another order
    for (name, one), other in zip(snapshot(gm).items(), snapshot(twin).values(), strict=True):
        error = (one.double() - other.double()).norm()
        assert float(error) <= (0 if exact else 0.01) * float(other.double().norm()), name
    gm.eval()
    twin.eval()
    with torch.no_grad():
        x = batches(1, 16, seed=9)[0]
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", [chain, residual, Separable])
def test_under_autocast(build: type[nn.Module]) -> None:
    """Dense kernels inside, in the layout all the same."""
    sparse, dense = pair(build)
    found: list[dict[str, Tensor]] = []
    for gm in (sparse, dense):
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.02, momentum=0.9)
        for x in batches(3, 16):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = gm(x)
                loss = loss_of(y)
            loss.backward()
            optimizer.step()
        assert y.dtype is torch.bfloat16
        found.append({"output": y.detach().float(), **snapshot(gm)})
    for name, value in found[0].items():
        if not name.startswith("swat.") and value.is_floating_point():
            other = found[1][name]
            assert float((value - other).norm()) < 0.05 * float(other.norm()) + 0.01, name
    # In evaluation and out of autocast, float32 runs sparse again.
    x = batches(1, 16, seed=9)[0]
    with torch.no_grad():
        y = sparse.eval()(x)
        with kernels.reference_only():
            torch.testing.assert_close(y, sparse(x), rtol=1e-3, atol=1e-4)


def test_gradients_accumulate_over_two_forwards() -> None:
    sparse, dense = pair(residual)
    one, other = batches(2, 16)
    for gm in (sparse, dense):
        first, second = gm(one), gm(other)
        (loss_of(first) + loss_of(second)).backward()
    for (name, p), q in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).norm()) < 0.02 * float(q.grad.norm()) + 1e-6, name


def test_frozen_layers() -> None:
    """No weight gradient, no input gradient: each part of backward by itself."""
    for freeze in (["1.conv1", "2.down"], ["0", "1"]):
        gms = pair(residual)
        for gm in gms:
            for path in freeze:
                gm.get_submodule(path).requires_grad_(False)
            loss_of(gm(batches(1, 16)[0])).backward()
        for (name, p), q in zip(gms[0].named_parameters(), gms[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                assert float((p.grad - q.grad).norm()) < 0.02 * float(q.grad.norm()) + 1e-6, name


def test_checkpointed_activations() -> None:
    """Recomputed inside backward, with the thresholds of the first pass."""
    from torch.utils.checkpoint import checkpoint

    sparse, dense = pair(residual, "swat-u:0.8,period=1")
    for gm in (sparse, dense):
        for x in batches(2, 16):
            leaf = x.clone().requires_grad_()
            loss_of(checkpoint(gm, leaf, use_reentrant=False)).backward()
    for (name, p), q in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).norm()) < 0.02 * float(q.grad.norm()) + 1e-6, name


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
def test_gradients_of_branches_are_summed_in_place(half: bool) -> None:
    gm = swatfx.compile(residual(), "swat-u:0.9")
    assert "sparse" in chosen(gm).values()
    images = torch.randn(16, 3, 8, 8)
    for _ in range(2):
        gm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(gm(images))
        with torch.profiler.profile() as profile:
            loss.backward()
        sums = {e.key: e.count for e in profile.key_averages() if e.key.startswith("aten::add")}
        assert set(sums) == {"aten::add_"}, sums
