"""ImageNet-like folders of image files, read lazily."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from swatfx.datasets.batching import batch_count, mixed_seed, seeded
from swatfx.datasets.in_memory import STATISTICS
from swatfx.errors import InputError

_PARTS = ("train", "val")


@dataclass(frozen=True)
class ImageFolders:
    """An ImageNet-like data set: one folder a class under ``train`` and ``val``, read lazily.

    Training images are a random crop of 224x224 and a flip, test images the central 224x224 of
    a resize to 256; both are normalised. ``train`` and ``test`` are torchvision ImageFolders.
    """

    train: Any
    test: Any
    num_classes: int
    name: str
    workers: int

    def train_batch_count(self, batch_size: int) -> int:
        """Number of training batches in an epoch."""
        return batch_count(len(self.train), batch_size, shuffle=True)

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        device: torch.device | str,
        start_batch: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training batches, a pure function of (seed, epoch, batch index) as above."""
        order = torch.randperm(len(self.train), generator=seeded(seed, epoch, "order"))
        stop = self.train_batch_count(batch_size) * batch_size
        chosen = order[start_batch * batch_size : stop].tolist()
        return self._read(_Checked(_Seeded(self.train, seed, epoch)), chosen, batch_size, device)

    def test_batches(
        self, batch_size: int, *, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test images in the order of the folders."""
        return self._read(_Checked(self.test), range(len(self.test)), batch_size, device)

    def _read(
        self, source: Any, order: Sequence[int], batch_size: int, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: Any = torch.utils.data.DataLoader(
            source,
            batch_size=batch_size,
            sampler=order,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.device(device).type == "cuda",
            # Without its own generator a loader draws a seed from the global random state.
            generator=torch.Generator().manual_seed(0),
        )
        for images, labels in map(_whole, loader):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Unreadable:
    """A file that is no image, and why. A value, as what a worker raises comes with its traceback.

    Attributes:
        path: of the file.
        why: in one line.
    """

    path: str
    why: str


class _Checked(torch.utils.data.Dataset[Any]):
    """A data set that gives an `_Unreadable` for a file that it cannot read."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Any:
        try:
            return self.source[index]
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error
            files = getattr(self.source, "source", self.source).samples
            return _Unreadable(os.fspath(files[index][0]), f"{type(error).__name__}: {error}")


def _collate(items: list[Any]) -> Any:
    """A batch of `items`, or the first `_Unreadable` of them."""
    bad = next((item for item in items if isinstance(item, _Unreadable)), None)
    return torch.utils.data.default_collate(items) if bad is None else bad


def _whole(batch: Any) -> Any:
    """`batch`; raises InputError if a file of it could not be read."""
    if isinstance(batch, _Unreadable):
        raise InputError(
            f"an image of the data set cannot be read: {batch.why}",
            value=batch.path,
            remedy="mend or remove the file; with --resume the run goes on from its last epoch",
        )
    return batch


class _Seeded(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A data set whose random transforms depend on (seed, epoch, image) alone."""

    def __init__(self, source: Any, seed: int, epoch: int) -> None:
        self.source, self.seed, self.epoch = source, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mixed_seed(self.seed, self.epoch, index))
            image, label = self.source[index]
        return image, label


def open_folders(root: str | pathlib.Path | None, *, workers: int = 0) -> ImageFolders:
    """Open the folders of ImageNet below ``root``; ``workers`` processes read them.

    Raises :class:`InputError` if they are not there or cannot be read, if a class has no image, or
    if the classes of ``val`` are not those of ``train``.
    """
    if root is None or not all(os.path.isdir(os.path.join(root, part)) for part in _PARTS):
        raise InputError(
            "imagenet needs a folder that holds train/ and val/, each with one folder a class",
            value=None if root is None else str(root),
            remedy="pass root (--data-root)",
        )
    train, val = (_classes(os.path.join(root, part)) for part in _PARTS)
    if train != val:
        alone = sorted(set(train) ^ set(val))
        raise InputError(
            f"train/ and val/ have other classes: {len(alone)} of them are in one only, the first"
            f" in {'train' if alone[0] in train else 'val'}, and labels are by order of the names",
            value=os.path.join(root, "train" if alone[0] in train else "val", alone[0]),
            remedy="give both the same folders",
        )
    from torchvision import datasets, transforms

    finish = [transforms.ToTensor(), transforms.Normalize(*STATISTICS["imagenet"])]
    vary = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(256), transforms.CenterCrop(224)]
    splits = [
        datasets.ImageFolder(str(pathlib.Path(root) / folder), transforms.Compose(steps))
        for folder, steps in zip(_PARTS, (vary + finish, centre + finish), strict=True)
    ]
    return ImageFolders(splits[0], splits[1], len(splits[0].classes), "imagenet", workers)


def _classes(folder: str) -> list[str]:
    """Names of the class folders below `folder`; raises InputError for one without an image.

    Folders that cannot be read are an error here: torchvision passes over them in silence.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        counts = {name: 0 for name in names}
        for name in names:
            seen: set[str] = set()
            for path, _, files in os.walk(os.path.join(folder, name), True, _fail, True):
                real = os.path.realpath(path)
                if real in seen:
                    raise InputError(
                        "a folder of the data set comes twice, by a link",
                        value=path,
                        remedy="remove the link",
                    )
                seen.add(real)
                counts[name] += sum(file.lower().endswith(IMG_EXTENSIONS) for file in files)
    except OSError as error:
        raise InputError(
            f"a folder of the data set cannot be read: {error.strerror}",
            value=error.filename,
            remedy="give this user the right to list it",
        ) from error
    if not names:
        raise InputError(
            "a folder of the data set has no class folders",
            value=folder,
            remedy="put one folder a class into it",
        )
    for name, count in counts.items():
        if not count:
            raise InputError(
                "a class of the data set has no image",
                value=os.path.join(folder, name),
                remedy=f"remove the folder or fill it; images end in {' '.join(IMG_EXTENSIONS)}",
            )
    return names


def _fail(error: OSError) -> NoReturn:
    raise error
