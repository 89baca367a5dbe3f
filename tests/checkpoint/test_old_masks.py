"""Held masks in the form of before 2026-11 go on: in checkpoints, state dicts, exported programs.

The files in `tests/golden` were written by the last version that had that form, of the networks and
steps below; each holds the weights that it then came to.
"""

from __future__ import annotations

import copy
import gzip
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.checkpoint.file import write_file
from swatfx.compiled import HeldThreshold, SwatModule, sparse_layers
from swatfx.errors import CheckpointError
from swatfx.tensors import bits
from tests.nets.held_masks import POLICIES, TIMES, TOTAL, attached
from tests.nets.places import GOLDEN
from tests.nets.small_nets import assert_same, batches, plain, sgd, train

HELD = ["static", "set", "rigl", "snfs", "dsr", "gradual-magnitude", "soft-filter", "swat-frozen"]
HELD.append("swat-frozen-active")


def tiny() -> nn.Sequential:
    convs = [nn.Conv2d(3, 4, 3, 2, bias=False), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convs, nn.Linear(36, 4, bias=False))


def written(name: str, folder: pathlib.Path) -> pathlib.Path:
    path = folder / name
    path.write_bytes(gzip.decompress((GOLDEN / f"version_2_{name}.gz").read_bytes()))
    return path


def old_form(gm: SwatModule) -> dict[str, Any]:
    """The state dict of `gm` as it was then."""
    state = copy.deepcopy(dict(gm.state_dict()))
    for path, threshold in gm.swat.thresholds():
        if isinstance(threshold, HeldThreshold):
            key = f"swat.{path}."
            byte = state.pop(f"{key}open").to(torch.uint8).reshape(1)
            state[f"{key}threshold"] = torch.cat([state[f"{key}threshold"], byte])
            if state.pop(f"{key}held").item():
                state[f"{key}stamp"].fill_(2**62)
    return state


@pytest.mark.parametrize("name", ["rigl", "swat_frozen", "swat_u", "dst"])
def test_a_file_of_then_goes_on(name: str, tmp_path: pathlib.Path) -> None:
    path = written(f"{name}.ckpt", tmp_path)
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    gm = swatfx.load(path, model, optimizer=optimizer)
    for layer in sparse_layers(gm):
        assert layer.weight_threshold.is_held == (name in ("rigl", "swat_frozen"))
        assert int(layer.weight_threshold.stamp) < 10
    if name == "rigl":  # the next step grows
        assert [layer.held_threshold.open.item() for layer in sparse_layers(gm)] == [1]
    swatfx.attach(gm, optimizer, **TIMES)
    extra = swatfx.checkpoint.read_extra(path)
    train(gm, optimizer, batches(7)[extra["step"] :])
    for key, value in gm.named_parameters():
        # Written on another machine, maybe: sums may round otherwise there.
        torch.testing.assert_close(value.detach(), extra["then"][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("name", HELD)
def test_a_state_of_then_goes_on_bit_for_bit(name: str, cut: int, tmp_path: pathlib.Path) -> None:
    gm, optimizer = attached(POLICIES[name])
    train(gm, optimizer, batches(TOTAL)[:cut])
    now, then = copy.deepcopy(dict(gm.state_dict())), old_form(gm)
    assert then.keys() != now.keys()
    moments = copy.deepcopy(optimizer.state_dict())
    path = tmp_path / "a.ckpt"
    swatfx.save(gm, path, optimizer=optimizer)
    content = torch.load(path) | {"version": 2, "state_dict": then}
    write_file(content, path)
    losses = train(gm, optimizer, batches(TOTAL)[cut:])
    final = copy.deepcopy(dict(gm.state_dict()))

    given = copy.deepcopy(then)
    gm.load_state_dict(given)
    assert_same(given, then)  # who loads keeps what it has
    optimizer.load_state_dict(moments)
    assert_same(dict(gm.state_dict()), now)
    assert train(gm, optimizer, batches(TOTAL)[cut:]) == losses
    assert_same(dict(gm.state_dict()), final)

    torch.manual_seed(9)
    model = plain()
    other = sgd(model)
    twin = swatfx.load(path, model, optimizer=other)
    swatfx.attach(twin, other, **TIMES)
    assert_same(dict(twin.state_dict()), now)
    assert train(twin, other, batches(TOTAL)[cut:]) == losses
    assert_same(dict(twin.state_dict()), final)


def test_what_is_of_neither_form_is_refused(tmp_path: pathlib.Path) -> None:
    gm, _ = attached(POLICIES["rigl"])
    key = "swat.layer_2.weight_threshold."
    for name in ("held", "open"):
        state = dict(gm.state_dict())
        del state[key + name]
        with pytest.raises(RuntimeError, match=rf"Missing key.*{key}{name}"):
            gm.load_state_dict(state)
    swatfx.save(gm, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt")["version"] == 3  # what version 2 reads stays so
    content = torch.load(tmp_path / "a.ckpt")
    content["state_dict"][f"{key}held"].fill_(0.5)
    write_file(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"weight_threshold\.held.*neither 0 nor 1.*0\.5"):
        swatfx.load(tmp_path / "a.ckpt", plain())


def program(path: pathlib.Path) -> nn.Module:
    return torch.export.load(path).module()


def test_a_program_of_then_trains_with_the_gradients_that_it_was_told(
    tmp_path: pathlib.Path,
) -> None:
    module = program(written("rigl.pt2", tmp_path))
    buffer = module.get_buffer("swat.layer_3.weight_threshold.threshold")
    weight = module.get_parameter("3.weight")
    inactive, before = weight == 0, buffer.clone()
    gradients: list[Tensor] = []
    for opened in (1, 0):  # it was exported when the next step was to grow
        assert buffer[-1] == 1
        buffer[-1] = opened
        weight.grad = None
        module(batches(1)[0]).square().sum().backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert gradients[0][inactive].any() and not gradients[1][inactive].any()
    assert torch.equal(gradients[0][~inactive], gradients[1][~inactive])
    assert torch.equal(buffer[:-1], before[:-1])


def test_a_program_of_then_that_holds_no_mask_yet_ranks_anew(tmp_path: pathlib.Path) -> None:
    module = program(written("swat_frozen.pt2", tmp_path))
    name = "swat.layer_3.weight_threshold"
    buffer, stamp = module.get_buffer(f"{name}.threshold"), module.get_buffer(f"{name}.stamp")
    weight, before = module.get_parameter("3.weight"), buffer.clone()
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    module(batches(1)[0]).square().sum().backward()
    assert int(stamp) == 2 and buffer[-1] == 0 and not torch.equal(buffer, before)
    assert weight.grad is not None and weight.grad.any()
    assert not weight.grad[~bits.bits_to_mask(buffer[:-1], 144).view(4, 36)].any()
    stamp.fill_(2**62)  # as it held them
    before = buffer.clone()
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    for x in batches(2):
        module(x)
    assert int(stamp) == 2**62 and torch.equal(buffer, before)


def test_a_program_of_today_is_told_by_name(tmp_path: pathlib.Path) -> None:
    gm, optimizer = attached(POLICIES["rigl"], tiny)
    train(gm, optimizer, batches(1))
    swatfx.export(gm, tmp_path / "a.pt2", (batches(1)[0],), training=True)
    module = program(tmp_path / "a.pt2")
    weight = module.get_parameter("3.weight")
    inactive = weight == 0
    for opened in (1, 0):
        assert module.get_buffer("swat.layer_3.weight_threshold.held") == 1
        module.get_buffer("swat.layer_3.weight_threshold.open").fill_(opened)
        weight.grad = None
        module(batches(1)[0]).square().sum().backward()
        assert weight.grad is not None and bool(weight.grad[inactive].any()) == opened
