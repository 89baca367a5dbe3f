"""Thresholds over all ranks of a process group, with real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import swatfx

S = 0.75
# What each rank reads at each step; the second rank gets no sample at step 2.
SIZES = [(4, 4), (3, 5), (4, 0)]


def inputs(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = SIZES[step][rank]
    return torch.randn(rows, 12, generator=generator, dtype=torch.float64) * (1 + rank)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=False).double()
    policy = swatfx.swat_u(S, first_dense=False, global_threshold=True)
    gm = swatfx.compile(nn.Sequential(layer), policy)
    grads = []
    for step in range(len(SIZES)):
        layer.weight.grad = None
        gm(inputs(step, rank)).sum().backward()
        grads.append(layer.weight.grad)
    torch.save(grads, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo's file store wants POSIX")
def test_the_threshold_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step in range(len(SIZES)):
        parts = [inputs(step, rank) for rank in range(2)]
        whole = torch.cat(parts)
        k = whole.numel() - int(S * whole.numel())
        t = whole.abs().reshape(-1).sort(descending=True).values[k - 1]
        for rank, part in enumerate(parts):
            kept = part * (part.abs() >= t)
            expected = torch.ones(8, len(part), dtype=part.dtype) @ kept
            torch.testing.assert_close(found[rank][step], expected, rtol=1e-12, atol=1e-12)
