"""Folders of images that are wrong: each is one line that names the file or the folder."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from swatfx import datasets
from swatfx.cli.commands import main
from swatfx.errors import InputError


def _image(path: pathlib.Path, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path, kind)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """Three images in each of two classes, to train and to test."""
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            for number in range(3):
                _image(tmp_path / "data" / part / name / f"{number}.png")
    return tmp_path / "data"


def _read(root: pathlib.Path, workers: int = 0) -> int:
    data = datasets.open_data("imagenet", root, workers=workers)
    count = 0
    for images, _ in data.train_batches(4, seed=0, epoch=0, device="cpu"):
        count += len(images)
    for images, _ in data.test_batches(2, device="cpu"):
        count += len(images)
    return count


def test_right_folders_are_read_whatever_their_names(root: pathlib.Path) -> None:
    assert _read(root) == 12
    for part in ("train", "val"):
        folder = os.fsencode(root / part) + b"/\xff\xfe"
        os.mkdir(folder)
        shutil.copy(root / "train/ant/0.png", os.fsdecode(folder + b"/\xfa.PNG"))
        (root / part / "list.txt").write_text("not of a class\n")
        (root / part / "ant" / "notes.txt").write_text("no image\n")
    _image(root / "val/ant/deep/er/3.png")
    _image(root / "val/ant/jpeg inside.png", "JPEG")  # decoders go by the contents
    assert _read(root) == 16
    assert datasets.open_data("imagenet", root).num_classes == 3


def _remove(name: str) -> Callable[[pathlib.Path], None]:
    return lambda root: shutil.rmtree(root / name)


def _empty(root: pathlib.Path) -> None:
    _remove("train/bee")(root)
    (root / "train" / "bee").mkdir()


def _only_text(root: pathlib.Path) -> None:
    _empty(root)
    (root / "train" / "bee" / "a.txt").write_text("a")


def _renamed(root: pathlib.Path) -> None:
    (root / "val" / "bee").rename(root / "val" / "wasp")


def _added(root: pathlib.Path) -> None:
    _image(root / "val" / "aphid" / "0.png")


def _no_classes(root: pathlib.Path) -> None:
    for name in ("ant", "bee"):
        _remove(f"train/{name}")(root)
    _image(root / "train" / "0.png")


def _file_for_folder(root: pathlib.Path) -> None:
    _remove("val")(root)
    (root / "val").write_text("no folder")


def _loop(root: pathlib.Path) -> None:
    (root / "train" / "bee" / "again").symlink_to(root / "train" / "bee")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("val"), "holds train/ and val/"),
        (_remove("train"), "holds train/ and val/"),
        (_file_for_folder, "holds train/ and val/"),
        (_empty, "no image.*train/bee"),
        (_only_text, r"no image.*train/bee.*\.jpg"),
        (_renamed, "other classes: 2 .*train/bee"),
        (_added, "other classes: 1 .*val/aphid"),
        (_remove("val/bee"), "other classes: 1 .*train/bee"),
        (_no_classes, "no class folders.*train"),
        (_loop, "twice.*bee/again"),
    ],
)
def test_wrong_folders_are_seen_when_they_are_opened(
    root: pathlib.Path, spoil: Callable[[pathlib.Path], None], message: str
) -> None:
    spoil(root)
    with pytest.raises(InputError, match=message):
        datasets.open_data("imagenet", root)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "val" / "ant" / "deep").mkdir()
    scandir = os.scandir

    def locked(path: str) -> object:  # of root nothing is locked, and tests may run as root
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match="Permission denied.*val/ant/deep"):
        datasets.open_data("imagenet", root)


def _bytes(contents: bytes) -> Callable[[pathlib.Path], None]:
    return lambda path: (path.write_bytes(contents), None)[1]


def _cut(kind: str, share: float) -> Callable[[pathlib.Path], None]:
    def spoil(path: pathlib.Path) -> None:
        _image(path, kind)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return spoil


def _flipped(path: pathlib.Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    path.write_bytes(contents)


def _dangling(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


SPOILED: dict[str, Callable[[pathlib.Path], None]] = {
    "empty": _bytes(b""),
    "text": _bytes(b"no image\n"),
    "zeros": _bytes(bytes(1000)),
    "signature alone": _bytes(b"\x89PNG\r\n\x1a\n"),
    "png cut": _cut("PNG", 0.5),
    "png header": _cut("PNG", 0.005),
    "jpeg cut": _cut("JPEG", 0.6),
    "gif cut": _cut("GIF", 0.1),
    "webp cut": _cut("WEBP", 0.5),
    "tiff cut": _cut("TIFF", 0.5),
    "byte flipped": _flipped,
    "dangling link": _dangling,
}


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_file_that_is_no_image_is_named_when_it_is_met(
    root: pathlib.Path, part: str, what: str
) -> None:
    SPOILED[what](root / part / "bee" / "1.png")
    with pytest.raises(InputError, match=f"cannot be read: .*{part}/bee/1.png.*remove"):
        _read(root)


def test_what_a_worker_cannot_read_has_no_traceback(root: pathlib.Path) -> None:
    (root / "val" / "bee" / "1.png").write_bytes(b"no image\n")
    with pytest.raises(InputError, match="UnidentifiedImageError.*val/bee/1.png") as error:
        _read(root, workers=1)
    assert "Traceback" not in str(error.value)


def test_the_command_line_says_it_in_one_line(
    root: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = [
        "train",
        "--model",
        "digits/cnn",
        "--data",
        "imagenet",
        "--data-root",
        str(root),
        "--policy",
    ]
    (root / "val" / "ant" / "0.png").write_bytes(b"no image\n")
    assert main([*line, "dense"]) != 0
    (root / "val" / "bee").rename(root / "val" / "wasp")
    assert main([*line, "dense"]) != 0
    first, second = capfd.readouterr().err.splitlines()
    assert "ant/0.png" in first and "other classes" in second
