"""ImageNet-like folders of image files, read lazily."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swatfx.datasets.batching import batch_count, mixed_seed, seeded
from swatfx.datasets.in_memory import STATISTICS
from swatfx.errors import InputError


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
        return self._read(_Seeded(self.train, seed, epoch), chosen, batch_size, device)

    def test_batches(
        self, batch_size: int, *, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test images in the order of the folders."""
        return self._read(self.test, range(len(self.test)), batch_size, device)

    def _read(
        self, source: Any, order: Sequence[int], batch_size: int, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: Any = torch.utils.data.DataLoader(
            source,
            batch_size=batch_size,
            sampler=order,
            num_workers=self.workers,
            pin_memory=torch.device(device).type == "cuda",
            # Without its own generator a loader draws a seed from the global random state.
            generator=torch.Generator().manual_seed(0),
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


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

    Raises :class:`InputError` if they are not there.
    """
    if root is None or not (pathlib.Path(root) / "train").is_dir():
        raise InputError(
            "imagenet needs a folder that holds train/ and val/, each with one folder a class",
            value=None if root is None else str(root),
            remedy="pass root (--data-root)",
        )
    from torchvision import datasets, transforms

    finish = [transforms.ToTensor(), transforms.Normalize(*STATISTICS["imagenet"])]
    vary = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(256), transforms.CenterCrop(224)]
    splits = [
        datasets.ImageFolder(str(pathlib.Path(root) / folder), transforms.Compose(steps))
        for folder, steps in (("train", vary + finish), ("val", centre + finish))
    ]
    return ImageFolders(splits[0], splits[1], len(splits[0].classes), "imagenet", workers)
