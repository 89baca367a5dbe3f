"""Checkpoint files: written whole or not at all, and refused with a reason."""

from __future__ import annotations

import errno
import os
import pathlib
import stat
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swatfx
from swatfx.checkpoint import saving as checkpoint
from swatfx.checkpoint.saving import read_extra
from swatfx.compiled.module import SwatModule
from swatfx.errors import CheckpointError, InputError
from swatfx.files.atomic import write_atomically
from tests.nets.small_nets import Residual, assert_same, batches, plain, sgd, snapshot, train


def _compiled() -> SwatModule:
    torch.manual_seed(0)
    return swatfx.compile(plain(), "swat-u:0.8,period=2")


def _full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def _half_written(content: Any, path: pathlib.Path) -> None:
    path.write_bytes(b"half a file")
    raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")


@pytest.mark.parametrize("failure", ["start", "middle", "move"])
def test_full_disk_leaves_the_old_file(
    failure: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    gm = _compiled()
    swatfx.save(gm, path)
    old = path.read_bytes()
    before = snapshot(gm)
    target: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "start": (torch, "save", _full),
        "middle": (checkpoint, "write_file", _half_written),
        "move": (os, "replace", _full),
    }
    monkeypatch.setattr(*target[failure])
    with pytest.raises(CheckpointError, match=r"cannot write.*a\.ckpt.*free some space"):
        swatfx.save(gm, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    assert_same(snapshot(gm), before)
    with pytest.raises(CheckpointError):
        swatfx.save(gm, tmp_path / "new.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux only")
def test_a_disk_that_is_really_full() -> None:
    with pytest.raises(CheckpointError, match="/dev/full"):
        swatfx.save(_compiled(), "/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)  # written to, not replaced


@pytest.mark.parametrize("suffix", ["pt2", "onnx", "safetensors"])
def test_full_disk_while_exporting(
    suffix: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
        monkeypatch.setattr(torch.onnx.ONNXProgram, "save", _full)
    else:
        monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(CheckpointError, match="No space left"):
        swatfx.export(_compiled(), path, (torch.randn(2, 3, 8, 8),))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_save_leaves_nothing_behind(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        swatfx.save(_compiled(), tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_missing_folder_and_folder_as_file(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "absent" / "a.ckpt", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            swatfx.save(_compiled(), path)
    assert not list(tmp_path.iterdir())


def test_permissions_and_links_are_kept(tmp_path: pathlib.Path) -> None:
    mask = os.umask(0o022)
    try:
        path = tmp_path / "a.txt"
        write_atomically(path, lambda p: p.write_text("1") and None)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o640)
        link = tmp_path / "latest.txt"
        link.symlink_to("a.txt")
        write_atomically(link, lambda p: p.write_text("2") and None)
    finally:
        os.umask(mask)
    assert link.is_symlink() and path.read_text() == "2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_damaged_files_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    swatfx.save(_compiled(), path)
    whole = path.read_bytes()
    model = plain()
    before = snapshot(model)
    bad = {"half": whole[: len(whole) // 2], "empty": b"", "noise": b"not a checkpoint" * 99}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"cut short.*{name}.*checkpoint before it"):
            swatfx.load(tmp_path / name, model)
    with pytest.raises(CheckpointError, match="no such checkpoint.*absent"):
        swatfx.load(tmp_path / "absent", model)
    torch.save(model.state_dict(), tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"not a swatfx checkpoint.*load_state_dict"):
        swatfx.load(tmp_path / "dense", model)
    newer = torch.load(path) | {"version": 99}
    torch.save(newer, tmp_path / "newer")
    with pytest.raises(CheckpointError, match=r"newer swatfx.*99.*upgrade"):
        swatfx.load(tmp_path / "newer", model)
    assert_same(snapshot(model), before)


def _wider() -> nn.Module:
    return nn.Sequential(*list(plain())[:-1], nn.Linear(512, 11))


def _longer() -> nn.Module:
    return nn.Sequential(*plain(), nn.ReLU(), nn.Linear(10, 2))


def _shorter() -> nn.Module:
    return nn.Sequential(*list(plain())[:-1])


def _with_norm() -> nn.Module:
    net = plain()
    net[1] = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_wider, r"layer '5': made for another model: weight_shape.*\[10, 512\] saved"),
        (_longer, r"layer '7': .*only the model has"),
        (_shorter, r"layer '5': .*only the checkpoint has"),
        (_with_norm, r"only the model has '1\.0\.weight'"),
        (Residual, r"made for another model.*layer|layer '.*': made for another model"),
    ],
)
def test_checkpoint_for_another_model(
    build: Callable[[], nn.Module], message: str, tmp_path: pathlib.Path
) -> None:
    gm = _compiled()
    optimizer = sgd(gm)
    train(gm, optimizer, batches(2))
    swatfx.save(gm, tmp_path / "a.ckpt", optimizer=optimizer)
    model = build()
    other = sgd(model)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        swatfx.load(tmp_path / "a.ckpt", model, optimizer=other)
    assert_same(snapshot(model), before)
    assert not other.state


def test_optimizer_that_does_not_fit(tmp_path: pathlib.Path) -> None:
    gm = _compiled()
    optimizer = sgd(gm)
    train(gm, optimizer, batches(2))
    swatfx.save(gm, tmp_path / "a.ckpt", optimizer=optimizer)
    swatfx.save(gm, tmp_path / "b.ckpt")
    model = plain()
    before = snapshot(model)
    wrong: list[tuple[str, torch.optim.Optimizer, str]] = [
        ("b.ckpt", sgd(model), "holds no optimizer.*without optimizer="),
        ("a.ckpt", torch.optim.SGD(list(model.parameters())[:2], lr=1.0), r"\[6\] saved, \[2\]"),
        ("a.ckpt", torch.optim.Adam(model.parameters()), "another kind of optimizer.*Adam"),
    ]
    for name, other, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            swatfx.load(tmp_path / name, model, optimizer=other)
        assert not other.state
    assert_same(snapshot(model), before)
    assert isinstance(swatfx.load(tmp_path / "a.ckpt", model), SwatModule)


def test_extra_comes_back_and_what_could_not_is_refused(tmp_path: pathlib.Path) -> None:
    gm = _compiled()
    extra = {"epoch": 3, "best": 0.5, "rng": torch.get_rng_state(), "tags": ("a", ["b", None])}
    swatfx.save(gm, tmp_path / "a.ckpt", extra=extra)
    back = read_extra(tmp_path / "a.ckpt")
    assert back.keys() == extra.keys() and back["tags"] == extra["tags"]
    assert torch.equal(back["rng"], extra["rng"])  # type: ignore[arg-type]
    old = (tmp_path / "a.ckpt").read_bytes()
    for value in (_Custom(), lambda: None):
        with pytest.raises(CheckpointError, match=r"extra\.best\.1 cannot be stored"):
            swatfx.save(gm, tmp_path / "a.ckpt", extra={"best": [1, value]})
    optimizer = sgd(gm)
    optimizer.param_groups[0]["lr"] = _Custom(0.1)
    with pytest.raises(CheckpointError, match=r"optimizer\.param_groups\.0\.lr"):
        swatfx.save(gm, tmp_path / "a.ckpt", optimizer=optimizer)
    assert (tmp_path / "a.ckpt").read_bytes() == old


class _Custom(float):
    """Like a numpy scalar: pickles, but torch.load refuses to read it back."""


def test_optional_inputs_need_no_example_inputs(tmp_path: pathlib.Path) -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
            y = self.a(x).relu()
            return y if extra is None else y + self.b(extra)

    x = torch.randn(2, 4)
    policy = swatfx.swat_u(0.5, first_dense=False)
    gm = swatfx.compile(Optional(), policy, example_inputs=(x, x))
    swatfx.save(gm, tmp_path / "a.ckpt")
    for example in ((x, x), {"x": x, "extra": x}, (x,), None):  # every call is the same model's
        twin = swatfx.load(tmp_path / "a.ckpt", Optional(), example_inputs=example)
        assert torch.equal(twin.eval()(x, x), gm.eval()(x, x))
        assert torch.equal(twin(x), gm(x))


def test_a_checkpoint_is_data_only(tmp_path: pathlib.Path) -> None:
    """Loading must not run what a file says."""
    path = tmp_path / "a.ckpt"
    torch.save({"format": "swatfx-checkpoint", "attack": _Evil(str(tmp_path / "ran"))}, path)
    with pytest.raises(CheckpointError):
        swatfx.load(path, plain())
    assert not (tmp_path / "ran").exists()


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_plan_in_the_file_is_json(tmp_path: pathlib.Path) -> None:
    import json

    swatfx.save(_compiled(), tmp_path / "a.ckpt")
    plan = json.loads(torch.load(tmp_path / "a.ckpt")["plan"])
    assert list(plan["layers"]) == ["0", "2", "5"]
    assert swatfx.Policy.from_json(plan["policy"]) == swatfx.swat_u(0.8, period=2)
    assert checkpoint.__doc__


def test_an_optimizer_of_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    gm = swatfx.compile(nn.Linear(8, 4), "swat-u:0.5,first_dense=False")
    own = torch.optim.SGD(gm.parameters(), lr=0.1)
    other = torch.optim.SGD(nn.Linear(8, 4).parameters(), lr=0.1)
    path = tmp_path / "a.ckpt"
    with pytest.raises(InputError, match="none of the model's parameters"):
        swatfx.save(gm, path, optimizer=other)
    with pytest.raises(InputError, match=r"list.*state dicts of the others in extra"):
        swatfx.save(gm, path, optimizer=[own, other])  # type: ignore[arg-type]
    assert not path.exists()
    swatfx.save(gm, path, optimizer=own)
    with pytest.raises(InputError, match="none of the model's parameters"):
        swatfx.load(path, nn.Linear(8, 4), optimizer=other)
