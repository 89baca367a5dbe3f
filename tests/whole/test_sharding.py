"""Sharded models are refused at once, by name: no rank sees a whole weight to rank."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import swatfx
from swatfx.compiled.module import SwatModule
from swatfx.errors import ChangedModelError
from tests.nets.small_nets import batches, plain, sgd

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of the CPU and of a world of one
REFUSED = r"layer '\w+'.*(spread over ranks|hook).*"
POLICIES = ("swat-u:0.8", "swat-m:0.8", "rigl:0.8,update_every=2", "dst:1e-4", "saw:0.8")
X = batches(1)[0]


class Outer(nn.Module):
    """Somebody else's module around the compiled model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(self.first(x))
        return y


def _init(rank: int, size: int, folder: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )


@pytest.fixture
def alone(tmp_path: pathlib.Path) -> Iterator[Any]:
    _init(0, 1, tmp_path)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def _compiled(policy: str) -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(plain(), policy)


def _check(run: nn.Module, gm: SwatModule, optimizer: Any = None) -> None:
    for mode in (True, False):
        run.train(mode)
        with pytest.raises(ChangedModelError, match=REFUSED):
            run(X)
    with pytest.raises(ChangedModelError, match=REFUSED):
        swatfx.attach(gm, optimizer or sgd(run), steps_per_epoch=2, total_steps=4)
    with pytest.raises(ChangedModelError, match=REFUSED):
        swatfx.save(gm, "never.ckpt")


@pytest.mark.parametrize("policy", POLICIES)
def test_fully_sharded(policy: str, alone: Any) -> None:
    gm = _compiled(policy)
    fully_shard(gm, mesh=alone)
    _check(gm, gm)


@pytest.mark.parametrize("policy", POLICIES)
def test_sharded_from_outside(policy: str, alone: Any) -> None:
    gm = _compiled(policy)
    outer = Outer(gm)
    fully_shard(outer, mesh=alone)
    _check(outer, gm)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sharded_layer(policy: str, alone: Any) -> None:
    gm = _compiled(policy)
    fully_shard(gm.get_submodule("5"), mesh=alone)
    _check(gm, gm)


def test_what_lies_around_may_be_sharded(alone: Any) -> None:
    """As the error says: the compiled model's parameters are ignored."""
    gm = _compiled("swat-u:0.8")
    alike = _compiled("swat-u:0.8")
    outer = Outer(gm)
    fully_shard(outer, mesh=alone, ignored_params=set(gm.parameters()))
    y = outer(X)
    y.square().mean().backward()
    first = nn.Conv2d(3, 3, 1)
    first.load_state_dict({k: v.full_tensor() for k, v in outer.first.state_dict().items()})
    torch.testing.assert_close(y, alike(first(X)))


def test_fsdp_of_the_first_kind(alone: Any) -> None:
    for original in (True, False):
        gm = _compiled("swat-u:0.8")
        cpu = torch.device("cpu")
        run = FullyShardedDataParallel(gm, use_orig_params=original, device_id=cpu)
        with pytest.raises(ChangedModelError, match=REFUSED):
            run(X)


def test_tensor_parallel(alone: Any) -> None:
    gm = _compiled("swat-u:0.8")
    parallelize_module(gm, alone, {"5": ColwiseParallel()})
    with pytest.raises(ChangedModelError, match=REFUSED):
        gm(X)


def _two(rank: int, folder: str) -> None:
    _init(rank, 2, folder)
    for wrap in (lambda gm: gm, Outer):
        gm = _compiled("rigl:0.8,update_every=2")
        outer = wrap(gm)
        fully_shard(outer)
        _check(outer, gm)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: pathlib.Path) -> None:
    mp.spawn(_two, (str(tmp_path),), nprocs=2)
