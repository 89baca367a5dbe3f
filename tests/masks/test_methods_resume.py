"""A method stopped in the middle of anything goes on bit for bit."""

from __future__ import annotations

import copy
import json
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx import models
from swatfx.checkpoint.saving import load
from swatfx.cli.commands import main
from swatfx.compiled.layers import sparse_layers
from swatfx.runs.folder import CHECKPOINT, METRICS
from swatfx.runs.run import RunConfig, train_run
from tests.nets.held_masks import OPTIMIZERS, POLICIES, TIMES, TOTAL, attached, masks_of, same
from tests.nets.small_nets import assert_same, batches, plain, sgd, train

# The steps after which training is stopped, and what is special about them.
CUTS: dict[str, list[int]] = {
    "static": [4],
    "set": [2, 3, 4],  # before, at and after an update; 3 ends an epoch, 4 is within one
    "rigl": [1, 2, 5],  # the next step sees dense gradients; just updated; the last update is next
    "snfs": [2, 3],
    "dsr": [1, 2, 7],  # its threshold is remembered
    "gradual-magnitude": [1, 3, 5, 6],  # before, inside and at the end of the ramp
    "soft-filter": [2, 3, 8],
    "swat-frozen": [2, 3, 4],  # before, at and after freezing
    "swat-frozen-active": [2, 3, 4],  # likewise, in the middle of a period
    "swat-active-update": [4],
    "forward-weights": [4],
    "forward-activations": [4],
    "saw": [4],
    "meprop": [4],
    "swat-u": [4],
    "swat-erk": [4],
    "swat-m": [4],
}


def _net() -> nn.Sequential:
    return plain(dropout=0.2)


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{k}": v for i, of in state.items() for k, v in of.items()}
    return {name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)}


def _train(gm: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Steps `first` to `last`; dropout depends on the step alone."""
    losses = []
    for step in range(first, last + 1):
        torch.manual_seed(step)
        losses += train(gm, optimizer, [batches(TOTAL)[step - 1]])
    return losses


def _assert_resumes(
    policy: swatfx.Policy, cuts: list[int], folder: pathlib.Path, kind: str
) -> None:
    gm, optimizer = attached(policy, _net, OPTIMIZERS[kind])
    losses, before = [], 0
    for cut in [*cuts, TOTAL]:
        losses += _train(gm, optimizer, before + 1, cut)
        swatfx.save(gm, folder / f"{cut}.ckpt", optimizer=optimizer)
        before = cut
    expected, moments = dict(gm.state_dict()), _state(optimizer)
    for cut in cuts:
        torch.manual_seed(99)
        net = _net()
        other = OPTIMIZERS[kind](net.parameters())
        twin = swatfx.load(folder / f"{cut}.ckpt", net, optimizer=other)
        loaded = copy.deepcopy(dict(twin.state_dict()))
        swatfx.attach(twin, other, **TIMES)
        assert_same(dict(twin.state_dict()), loaded)  # nothing is left for attach to change
        assert _train(twin, other, cut + 1, TOTAL) == losses[cut:], cut
        assert_same(dict(twin.state_dict()), expected)
        assert_same(_state(other), moments)


def test_every_method_is_here() -> None:
    assert list(CUTS) == list(POLICIES)


@pytest.mark.parametrize("name", CUTS)
def test_save_and_load_go_on_bit_for_bit(name: str, tmp_path: pathlib.Path) -> None:
    _assert_resumes(POLICIES[name], CUTS[name], tmp_path, "sgd")


@pytest.mark.parametrize("name", ["rigl", "snfs", "gradual-magnitude"])
def test_so_do_the_moments_of_adam(name: str, tmp_path: pathlib.Path) -> None:
    _assert_resumes(POLICIES[name], CUTS[name], tmp_path, "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adam", "rmsprop", "adagrad", "sgd without momentum"])
@pytest.mark.parametrize("name", CUTS)
def test_every_step_of_every_method(name: str, kind: str, tmp_path: pathlib.Path) -> None:
    if name in ("snfs", "swat-m") and kind in ("adagrad", "sgd without momentum"):
        pytest.skip("reads momentum")
    _assert_resumes(POLICIES[name], list(range(1, TOTAL)), tmp_path, kind)


@pytest.mark.parametrize("name", ["set", "rigl", "dsr", "swat-frozen"])
def test_two_methods_in_one_network(name: str, tmp_path: pathlib.Path) -> None:
    policy = swatfx.per_layer({"2": POLICIES[name]}, default=POLICIES["gradual-magnitude"])
    _assert_resumes(policy, [1, 3, 6], tmp_path, "sgd")


def test_the_state_dict_of_an_attached_model_goes_on() -> None:
    """With the flag that opens dense gradients: the step after the first grows."""
    gm, optimizer = attached(POLICIES["rigl"])
    train(gm, optimizer, batches(1))
    assert all(x.held_threshold.open.item() == 1 for x in sparse_layers(gm))
    state, moments = copy.deepcopy((gm.state_dict(), optimizer.state_dict()))
    before = masks_of(gm)
    losses = train(gm, optimizer, batches(4, seed=1))
    assert not same(masks_of(gm), before)
    final = copy.deepcopy(dict(gm.state_dict()))
    gm.load_state_dict(state)
    optimizer.load_state_dict(moments)
    assert same(masks_of(gm), before)
    assert train(gm, optimizer, batches(4, seed=1)) == losses
    assert_same(dict(gm.state_dict()), final)


def test_detached_training_ends_the_updates() -> None:
    gm, optimizer = attached(POLICIES["static"])
    torch.manual_seed(0)
    other = swatfx.compile(plain(), POLICIES["static"])
    handle = swatfx.attach(other, second := sgd(other), **TIMES)
    handle.detach()
    assert train(gm, optimizer, batches(3)) == train(other, second, batches(3))
    assert int(other.swat.clock.updates) == 0


# ---- swatfx train --------------------------------------------------------------------------------

# 320 images make five steps of 64 an epoch; ten in all.
RUN = RunConfig(
    model="digits/cnn", data="digits", policy="", epochs=2, limit=320, device="cpu", threads=1
)


def _lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def _weights(folder: pathlib.Path) -> dict[str, Tensor]:
    return dict(load(folder / CHECKPOINT, models.resolve(RUN.model, 10)).state_dict())


@pytest.mark.parametrize(
    ("policy", "stop"),
    [
        ("rigl:0.9,update_every=2", 3),  # dense gradients in the next step
        ("snfs:0.9", 4),
        pytest.param("swat-frozen:0.9", 7, marks=pytest.mark.slow),
        pytest.param("gradual-magnitude:0.9,update_every=3", 4, marks=pytest.mark.slow),
        pytest.param("dsr:0.9,update_every=2", 6, marks=pytest.mark.slow),
        pytest.param("set:0.9", 5, marks=pytest.mark.slow),
        pytest.param("soft-filter:0.5", 7, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_resumes(policy: str, stop: int, tmp_path: pathlib.Path) -> None:
    config = replace(RUN, policy=policy, output_dir=str(tmp_path / "whole"))
    train_run(config)
    config = replace(config, output_dir=str(tmp_path / "parts"))
    first = train_run(replace(config, max_steps=stop))
    assert first.steps == stop and not first.finished
    train_run(replace(config, resume=True))
    assert _lines(tmp_path / "parts") == _lines(tmp_path / "whole")
    assert_same(_weights(tmp_path / "parts"), _weights(tmp_path / "whole"))


def test_a_run_from_the_command_line(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "--model", "digits/cnn", "--data", "digits", "--policy", "set:0.9"]
    words += ["--epochs", "2", "--limit", "128", "--device", "cpu", "--quiet"]
    assert main([*words, "--output-dir", str(folder), "--max-steps", "3"]) == 0
    assert main([*words, "--output-dir", str(folder), "--resume"]) == 0
    density = _lines(folder)[-1]["weight_density"]["mean"]
    assert density == pytest.approx(0.1, abs=0.005)
