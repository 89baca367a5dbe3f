"""A user's own method: rules and a constructor registered at run time, and no pass touched."""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import swatfx
from swatfx.masks.rules import DROPS, GROWS, GrowRule, by_score, largest
from swatfx.policy import CONSTRUCTORS, Policy
from tests.nets.held_masks import (
    TIMES,
    TOTAL,
    active,
    assert_inactive_are_zero,
    attached,
    masks_of,
    same,
    steps,
)
from tests.nets.small_nets import assert_same, batches, plain, sgd, train


def _register_fading() -> None:
    """Drop what faded: the smallest products of weight and gradient; grow where the row is busy."""

    def faded(layers: Any, fraction: float, memory: Tensor) -> list[Tensor]:
        memory += 1  # a drop rule may count, and a checkpoint keeps it
        chosen = []
        for layer in layers:
            scores = -(layer.weight * layer.gradient).abs()
            chosen.append(largest(scores, layer.keep, int(fraction * layer.active)))
        return chosen

    def busy_rows(layer: Any) -> Tensor:
        rows: Tensor = layer.keep.flatten(1).sum(1).view(-1, *[1] * (layer.keep.dim() - 1))
        return rows + layer.gradient.abs()

    def fading(sparsity: float, **options: Any) -> Policy:
        """Ours."""
        fields = {"drop": "faded", "grow": "busy-rows", "drop_fraction": 0.2, "update_every": 2}
        return replace(swatfx.static(sparsity), name="fading", **{**fields, **options})

    DROPS["faded"] = faded
    GROWS["busy-rows"] = GrowRule(by_score(busy_rows), frozenset({"gradient"}))
    CONSTRUCTORS["fading"] = fading


@pytest.fixture
def tables() -> Iterator[None]:
    """What is registered in a test is gone after it."""
    known = [(table, dict(table)) for table in (DROPS, GROWS, CONSTRUCTORS)]
    yield
    for table, before in known:
        table.clear()
        table.update(before)


def test_a_method_of_ones_own_in_under_thirty_lines(tables: None, tmp_path: pathlib.Path) -> None:
    assert len(inspect.getsource(_register_fading).splitlines()) < 30
    _register_fading()
    gm, optimizer = attached("fading:0.8")
    assert swatfx.report(gm, batches(1)[0]).totals["weight_sparsity"] == pytest.approx(
        0.8, abs=0.01
    )
    before = masks_of(gm)
    for step in steps(gm, optimizer):
        assert_inactive_are_zero(gm)
        assert active(masks_of(gm)) == active(before)
        assert gm.swat.memory_of(0).item() == step // 2
        if step == 4:
            swatfx.save(gm, tmp_path / "own.ckpt", optimizer=optimizer)
    assert not same(masks_of(gm), before)
    net = plain()
    other = sgd(net)
    twin = swatfx.load(tmp_path / "own.ckpt", net, optimizer=other)
    swatfx.attach(twin, other, **TIMES)
    train(twin, other, batches(TOTAL)[4:])
    assert_same(dict(twin.state_dict()), dict(gm.state_dict()))
