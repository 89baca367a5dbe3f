"""Two gloo processes compute what one process computes on the joined batch."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import swatfx
from swatfx.compiled.module import SwatModule
from tests.nets.small_nets import (
    Residual,
    assert_same,
    batches,
    loss_of,
    plain,
    sgd,
    snapshot,
    train,
)

STEPS, SIZE = 4, 4


def _compiled(policy: swatfx.Policy) -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(plain(), policy)


class Outer(nn.Module):
    """Somebody else's module around the compiled model, with a buffer that is to be broadcast."""

    mine: torch.Tensor

    def __init__(self, net: nn.Module, rank: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mine", torch.tensor(float(rank)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)
        return y


def _worker(rank: int, folder: str, policy: swatfx.Policy, compiled: bool, outer: bool) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    gm = _compiled(policy)
    around = Outer(gm, rank) if outer else gm
    wrapped: Any = DistributedDataParallel(around)
    optimizer = sgd(gm)
    swatfx.attach(gm if outer else wrapped, optimizer)
    run = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    mine = [x[rank * SIZE : (rank + 1) * SIZE] for x in batches(STEPS, 2 * SIZE)]
    losses = train(run, optimizer, mine)
    if rank == 0:
        swatfx.save(gm, f"{folder}/saved.ckpt", optimizer=optimizer)
    if isinstance(around, Outer):
        assert around.mine == 0  # rank 0's
    torch.save((losses, snapshot(gm)), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _spawn(
    folder: pathlib.Path, policy: swatfx.Policy, compiled: bool = False, outer: bool = False
) -> list[Any]:
    mp.spawn(_worker, (str(folder), policy, compiled, outer), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _joined(policy: swatfx.Policy) -> tuple[list[float], dict[str, torch.Tensor]]:
    gm = _compiled(policy)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    losses = train(gm, optimizer, batches(STEPS, 2 * SIZE))
    return losses, snapshot(gm)


def _check_equal(ranks: list[Any], policy: swatfx.Policy, thresholds: bool) -> None:
    losses, state = _joined(policy)
    for mine, theirs in zip(losses, zip(*(r[0] for r in ranks), strict=True), strict=True):
        assert sum(theirs) / 2 == pytest.approx(mine, rel=1e-4)
    for _, other in ranks:
        assert list(other) == list(state)
        for name, value in state.items():
            if name.startswith("swat.") and not thresholds and "activation" in name:
                continue
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [pytest.param("uniform", marks=pytest.mark.slow), "momentum"])
def test_two_processes_equal_one(tmp_path: pathlib.Path, kind: str) -> None:
    """With thresholds over all ranks: the same activations are kept, so gradients are the same."""
    make = {"uniform": swatfx.swat_u, "momentum": swatfx.swat_m}[kind]
    policy = make(0.8, period=2, global_threshold=True)
    ranks = _spawn(tmp_path, policy)
    _check_equal(ranks, policy, thresholds=True)
    assert_same(ranks[0][1], ranks[1][1])


@pytest.mark.parametrize("outer", [False, True])
def test_each_rank_keeps_its_own_thresholds(tmp_path: pathlib.Path, outer: bool) -> None:
    """Without the option, activation thresholds are a rank's own; DDP does not overwrite them."""
    policy = swatfx.swat_u(0.8, period=2)
    first, second = (state for _, state in _spawn(tmp_path, policy, outer=outer))
    for name, value in first.items():
        own = "activation_threshold.threshold" in name
        assert torch.equal(value, second[name]) != own, name
    gm = _compiled(policy)
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer)
    resumed = swatfx.load(tmp_path / "saved.ckpt", plain(), optimizer=None)
    state = snapshot(resumed)
    assert_same(state, {k: v for k, v in first.items() if k in state})


@pytest.mark.slow
def test_compiled_ddp_equals_one_process(tmp_path: pathlib.Path) -> None:
    policy = swatfx.swat_u(0.8, period=2, global_threshold=True)
    _check_equal(_spawn(tmp_path, policy, compiled=True), policy, thresholds=True)


def test_only_counts_travel(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """One process group of one rank: watch what is reduced."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        seen: list[tuple[torch.dtype, int]] = []
        reduce = torch.distributed.all_reduce

        def watch(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((tensor.dtype, tensor.numel()))
            return reduce(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.distributed, "all_reduce", watch)
        for name in ("all_gather", "all_gather_object", "all_gather_into_tensor", "gather"):
            monkeypatch.setattr(torch.distributed, name, None)
        gm = _compiled(swatfx.swat_u(0.8, global_threshold=True))
        alone = _compiled(swatfx.swat_u(0.8))
        x = batches(1, 8)[0]
        loss_of(gm(x)).backward()
        assert seen and all(dtype == torch.int64 and n <= 1 << 13 for dtype, n in seen)
        count = len(seen)
        loss_of(alone(x)).backward()
        assert len(seen) == count
        for (name, p), q in zip(gm.named_parameters(), alone.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.equal(p.grad, q.grad), name
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [lambda gm: gm, lambda gm: Outer(gm, 0), torch.compile])
def test_no_buffer_of_ours_is_broadcast(tmp_path: pathlib.Path, wrap: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        around = wrap(swatfx.compile(Residual(), swatfx.swat_u(0.8)))
        wrapped = DistributedDataParallel(around)
        ours = {name for name, _ in around.named_buffers() if "swat." in name}
        theirs = {name for name, _ in around.named_buffers()} - ours
        assert ours and ours <= wrapped.parameters_to_ignore
        assert theirs and not theirs & wrapped.parameters_to_ignore
        assert len(wrapped.modules_buffers) == len(theirs)
    finally:
        torch.distributed.destroy_process_group()
