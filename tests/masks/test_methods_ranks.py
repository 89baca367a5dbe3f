"""Two gloo processes hold the same masks, and say so where they do not."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import swatfx
from swatfx.compiled.held import HeldThreshold
from swatfx.compiled.module import SwatModule
from swatfx.errors import AttachError
from tests.nets.held_masks import POLICIES, TIMES, TOTAL, masks_of, same
from tests.nets.small_nets import assert_same, batches, plain, sgd, snapshot, train

NAMES = ["static", "set", "rigl", "snfs", "dsr", "gradual-magnitude", "soft-filter", "swat-frozen"]
SIZE = 4


def _compiled(name: str, seed: int = 0) -> SwatModule:
    torch.manual_seed(seed)
    return swatfx.compile(plain(), POLICIES[name])


def _train(name: str, rank: int) -> tuple[SwatModule, dict[str, torch.Tensor]]:
    """All steps on this rank's half of each batch; also the masks at the start."""
    gm = _compiled(name)
    start = masks_of(gm)
    optimizer = sgd(gm)
    wrapped: Any = DistributedDataParallel(gm)
    swatfx.attach(wrapped, optimizer, **TIMES)
    train(wrapped, optimizer, [x[rank * SIZE :][:SIZE] for x in batches(TOTAL, 2 * SIZE)])
    return gm, start


def _break(gm: SwatModule) -> None:
    """Move one active weight of layer 5."""
    threshold = gm.swat.get_submodule("layer_5.weight_threshold")
    mask = masks_of(gm)["5"].flatten().clone()
    mask[mask.nonzero()[0]] = False
    mask[(~mask).nonzero()[-1]] = True
    assert isinstance(threshold, HeldThreshold)
    threshold.set_mask(mask)


def _refusals(rank: int) -> dict[str, str]:
    """What attach, an update and attach after other weights say where rank 1 holds other masks."""
    said = {}
    gm = _compiled("static")
    if rank == 1:
        _break(gm)
    with pytest.raises(AttachError) as caught:
        swatfx.attach(DistributedDataParallel(gm), sgd(gm), **TIMES)
    said["attach"] = str(caught.value)
    gm, optimizer = _compiled("set"), None
    optimizer = sgd(gm)
    wrapped: Any = DistributedDataParallel(gm)
    swatfx.attach(wrapped, optimizer, **TIMES)
    train(wrapped, optimizer, batches(2))
    if rank == 1:
        _break(gm)
    with pytest.raises(AttachError) as caught:
        train(wrapped, optimizer, batches(1))
    said["update"] = str(caught.value)
    gm = _compiled("soft-filter", seed=rank)  # masks of weights that DDP makes the same later
    with pytest.raises(AttachError) as caught:
        swatfx.attach(DistributedDataParallel(gm), sgd(gm), **TIMES)
    said["weights"] = str(caught.value)
    return said


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    result: dict[str, Any] = {}
    for name in NAMES:
        gm, start = _train(name, rank)
        result[name] = (start, masks_of(gm), snapshot(gm))
    torch.save((result, _refusals(rank)), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the two processes saw."""
    folder: pathlib.Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_hold_the_same_masks(name: str, ranks: list[Any]) -> None:
    (start, masks, state), (_, other_masks, other_state) = (result[name] for result, _ in ranks)
    assert same(masks, other_masks)
    assert same(start, masks) == (name == "static")

    def parts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in tensors.items() if "activation_threshold" not in k}

    assert_same(parts(state), parts(other_state))


@pytest.mark.parametrize(("when", "layer"), [("attach", "5"), ("update", "5"), ("weights", "0")])
def test_ranks_that_hold_different_masks_are_stopped(
    when: str, layer: str, ranks: list[Any]
) -> None:
    for _, said in ranks:  # each of them, so that none waits for the other
        assert said[when].startswith(f"layer '{layer}': the ranks' masks differ"), said[when]
        assert "same weights and seed" in said[when]


def test_a_single_process_asks_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    gm = _compiled("set")
    optimizer = sgd(gm)
    swatfx.attach(gm, optimizer, **TIMES)
    before = masks_of(gm)
    train(gm, optimizer, batches(TOTAL))
    assert not same(masks_of(gm), before)
