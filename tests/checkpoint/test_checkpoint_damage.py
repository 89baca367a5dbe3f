"""Damaged and odd checkpoints: refused with a reason, or read as what was written."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.checkpoint import saving as checkpoint
from swatfx.checkpoint.checks import read_content
from swatfx.errors import CheckpointError
from tests.nets.small_nets import assert_same, sgd, snapshot


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def write(path: pathlib.Path, policy: str = "swat-u:0.5,first_dense=false") -> dict[str, Any]:
    """A checkpoint of a model that took a step; returns what torch.load reads."""
    model = net()
    gm = swatfx.compile(model, policy)
    optimizer = sgd(model)
    if gm.swat.clock.optimizer_wanted_by:
        swatfx.attach(gm, optimizer, steps_per_epoch=4, total_steps=8)
    gm(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    swatfx.save(gm, path, optimizer=optimizer, extra={"epoch": 3, "tags": ["a", None]})
    return dict(torch.load(path))


def same(a: Any, b: Any) -> bool:
    """Equal down to the last bit of every tensor."""
    if isinstance(a, Tensor):
        bits = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return bits and torch.equal(
            a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def _silent(path: pathlib.Path, damaged: bytes, whole: Any) -> bool:
    """Whether the damaged bytes are read as something else."""
    path.write_bytes(damaged)
    try:
        read = checkpoint._read(path)
        read.check_sound()
    except CheckpointError as error:
        assert "\n" not in str(error)
        return False
    return not all(same(getattr(read, name), getattr(whole, name)) for name in vars(whole))


def _version_1(path: pathlib.Path) -> None:
    content = write(path)
    torch.save(content | {"version": 1}, path)


@pytest.mark.parametrize("make", [write, _version_1])
@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere(
    make: Callable[[pathlib.Path], Any], step: int, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.ckpt"
    make(path)
    raw, whole = path.read_bytes(), checkpoint._read(path)
    for at in range(0, len(raw), step):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << (at // step) % 8
        assert not _silent(path, bytes(damaged), whole), f"byte {at} of {len(raw)}"
        if make is write:
            with pytest.raises(CheckpointError):  # not one bit may differ
                checkpoint._read(path).check_sound()


@pytest.mark.parametrize("make", [write, _version_1])
def test_cut_appended_and_swapped(
    make: Callable[[pathlib.Path], Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.ckpt"
    make(path)
    raw, whole = path.read_bytes(), checkpoint._read(path)
    half = len(raw) // 2
    cases = [raw[half:] + raw[:half], raw + b"\0", raw + raw, raw + b"x" * 78, raw[1:]]
    cases += [
        raw[:length] for length in (*range(0, len(raw), 97), *range(len(raw) - 120, len(raw)))
    ]
    cases += [raw[:half] + bytes(512) + raw[half + 512 :], raw[:-64] + b"0" * 64]
    for damaged in cases:
        assert not _silent(path, damaged, whole), len(damaged)


def test_version_1_goes_on_loading(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    content = write(path)
    plan = json.loads(content["plan"])
    del plan["options"]  # as the first ones were
    torch.save(content | {"version": 1, "plan": json.dumps(plan)}, path)
    model = net()
    optimizer = sgd(model)
    gm = swatfx.load(path, model, optimizer=optimizer)
    assert_same(gm.state_dict(), content["state_dict"])
    assert same(optimizer.state_dict(), content["optimizer"])


ODD: list[Any] = [None, True, -1, float("nan"), "odd", b"odd", [], {}, [[1]], {"odd": 1}]
ODD += [torch.zeros(2), torch.full((), float("nan")), 2**70, torch.empty(3, device="meta")]


def _changed(content: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of `content` in which `change` was made to the container and key at `path`."""
    twin = copy.deepcopy(content)
    twin["plan"] = json.loads(twin["plan"])
    at: Any = twin
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    if isinstance(twin.get("plan"), dict):
        try:
            twin["plan"] = json.dumps(twin["plan"])
        except TypeError:
            return None  # bytes and tensors are no JSON
    return twin


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field of nested dicts, and the first and last item of lists."""
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = sorted({0, len(value) - 1} & set(range(len(value))))
    for key in keys:
        yield (*prefix, key)
        yield from _paths(value[key], (*prefix, key))


def _changes(content: dict[str, Any], every: int) -> Iterator[tuple[str, Any]]:
    """(what was done, content) for each field removed and replaced by odd values."""
    plain = content | {"plan": json.loads(content["plan"])}
    done = 0
    for path in _paths(plain):
        for value in ("gone", *ODD):
            done += 1
            if done % every:
                continue
            if isinstance(value, str) and value == "gone":
                twin = _changed(content, path, lambda at, key: at.__delitem__(key))
            else:
                twin = _changed(
                    content, path, lambda at, key, v=value: at.__setitem__(key, copy.deepcopy(v))
                )
            if twin is not None:
                yield f"{path}: {value!r}", twin


def _outcome(
    content: Any, path: pathlib.Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Load `content` as if its checksum were right; what became of it."""
    monkeypatch.setattr(checkpoint, "read_file", lambda path: (copy.deepcopy(content), True))
    optimizer = sgd(model)
    weights, options = snapshot(model), copy.deepcopy(optimizer.state_dict())
    try:
        gm = swatfx.load(path, model, optimizer=optimizer)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        assert_same(snapshot(model), weights)
        assert same(optimizer.state_dict(), options)
        return str(error)
    if not isinstance(content["extra"], dict):
        return "extra"
    assert not any(
        isinstance(value, Tensor) and value.is_meta for value in gm.state_dict().values()
    )
    return "loaded"


@pytest.mark.parametrize("policy", ["swat-u:0.5,first_dense=false", "rigl:0.5,update_every=2"])
@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_odd_fields_are_refused_or_change_nothing(
    policy: str, every: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "a.ckpt", policy)
    whole = read_content(copy.deepcopy(content), True)
    tried = loaded = 0
    for what, odd in _changes(content, every):
        said = _outcome(odd, tmp_path / "a.ckpt", net(), monkeypatch)
        tried += 1
        if said != "loaded":
            continue
        loaded += 1
        read = read_content(odd, True)
        different = [n for n in ("policy", "options") if getattr(read, n) != getattr(whole, n)]
        # What may differ is what a training may have left so: values of tensors, options of an
        # optimizer, what the user put into `extra`, or a policy's field that is at its default.
        assert not different or "'policy'" in what, what
    assert tried > 40 and loaded < tried / 3, (tried, loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("plan"), "'plan' of the checkpoint is missing"),
        (lambda c: c.pop("version"), "'version' of the checkpoint is no version number"),
        (lambda c: c.update(version="2"), r"'version'.*'2'"),
        (lambda c: c.update(version=99), r"'version'.*newer swatfx.*99.*upgrade"),
        (lambda c: c.update(plan="{"), "'plan' of the checkpoint is no JSON"),
        (lambda c: c.update(plan="[]"), "'plan' of the checkpoint is no dict"),
        (lambda c: c.update(more=1), "'more' of the checkpoint is none that this version knows"),
        (lambda c: c.update(state_dict=[]), "'state_dict' of the checkpoint is no dict"),
        (lambda c: c.update(extra=None), "'extra' of the checkpoint is no dict"),
        (lambda c: c["optimizer"].pop("state"), r"'optimizer\.state' of the checkpoint is missing"),
        (
            lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"),
            r"'optimizer\.param_groups\.0\.lr' of the checkpoint is of another kind",
        ),
        (
            lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1, 9)),
            r"'optimizer\.state\.0\.momentum_buffer'.*not shaped as its parameter, \(6, 4\)",
        ),
        (
            lambda c: c["state_dict"].update({"3.weight": torch.zeros(3, 6).double()}),
            r"dtype of '3\.weight' differs.*float64 saved, torch\.float32 now",
        ),
        (
            lambda c: c["state_dict"]["swat.layer_3.weight_threshold.density"].fill_(float("nan")),
            r"'state_dict\.swat\.layer_3\.weight_threshold\.density'.*outside \[0, 1\].*nan",
        ),
        (lambda c: c["state_dict"].pop("1.running_var"), r"only the model has '1\.running_var'"),
        (
            lambda c: c.update(plan=c["plan"].replace('"period"', '"perod"', 1)),
            r"'plan\.policy'.*unknown policy field.*'perod'",
        ),
        (
            lambda c: c.update(plan=c["plan"].replace('"3": {', '"4": {', 1)),
            r"layer '4'.*only the checkpoint has this layer",
        ),
    ],
)
def test_the_field_is_named(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: pathlib.Path
) -> None:
    """Also where the content was written anew, without a checksum."""
    path = tmp_path / "a.ckpt"
    content = write(path)
    change(content)
    torch.save(content, path)
    model = net()
    optimizer = sgd(model)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        swatfx.load(path, model, optimizer=optimizer)
    assert_same(snapshot(model), before)
    assert not optimizer.state


def test_content_written_anew_has_lost_its_checksum(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(write(path), path)
    with pytest.raises(CheckpointError, match="lost its checksum"):
        swatfx.load(path, net())


def test_a_policy_that_zeroes_weights_leaves_a_refused_model_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    write(path, "rigl:0.5,update_every=2")
    model = nn.Sequential(*net(), nn.Linear(3, 3))
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="layer '4'"):
        swatfx.load(path, model)
    assert_same(snapshot(model), before)


def test_learned_thresholds_leave_a_refused_optimizer_alone(tmp_path: pathlib.Path) -> None:
    model = net()
    gm = swatfx.compile(model, "dst:1e-3")
    swatfx.save(gm, tmp_path / "a.ckpt", optimizer=sgd(gm))
    other = net()
    optimizer = torch.optim.Adam(other.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError):
        swatfx.load(tmp_path / "a.ckpt", other, optimizer=optimizer)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    "chosen",
    [
        lambda parameters: parameters[::-1],
        lambda parameters: parameters[2:] + parameters[:2],
        lambda parameters: [*parameters[:-1], nn.Parameter(torch.zeros(5, 5))],
    ],
)
def test_an_optimizer_over_other_parameters_is_not_blamed_on_the_checkpoint(
    chosen: Callable[[list[nn.Parameter]], list[nn.Parameter]], tmp_path: pathlib.Path
) -> None:
    write(tmp_path / "a.ckpt")
    model = net()
    optimizer = torch.optim.SGD(chosen(list(model.parameters())), lr=0.1, momentum=0.9)
    with pytest.raises(CheckpointError, match="optimizer given holds other.*another order") as said:
        swatfx.load(tmp_path / "a.ckpt", model, optimizer=optimizer)
    assert "make the optimizer as it was" in str(said.value) and "before it" not in str(said.value)
    assert not optimizer.state
    swatfx.load(tmp_path / "a.ckpt", model, optimizer=sgd(model))


def test_a_compiled_model_is_not_loaded_into(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.ckpt")
    gm = swatfx.compile(net(), "swat-u:0.5,first_dense=false")
    for given in (gm, nn.Sequential(gm)):
        with pytest.raises(swatfx.SwatError, match=r"compiled already.*gm = swatfx\.load\(path, "):
            swatfx.load(tmp_path / "a.ckpt", given)


def test_what_is_no_checkpoint_points_to_those_beside_it(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "absent.ckpt"):
        with pytest.raises(CheckpointError, match="give the file that swatfx.save wrote"):
            swatfx.load(path, net())
    write(tmp_path / "checkpoint.ckpt")
    for path in (tmp_path, tmp_path / "absent.ckpt"):
        with pytest.raises(CheckpointError, match=r"there is .*checkpoint\.ckpt"):
            swatfx.load(path, net())


def test_a_folder_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    for path, message in (
        (tmp_path, "it is a folder"),
        ("", "names no file"),
        ("a\0b", "names no"),
    ):
        with pytest.raises(swatfx.SwatError, match=message):
            swatfx.load(path, net())
