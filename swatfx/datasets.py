"""Small image data sets held as tensors, and ImageNet-like folders read lazily.

A training run that is resumed must continue bit for bit, so nothing here draws from the global
random state: the order of an epoch and the augmentation of a batch are pure functions of
(seed, epoch, batch index), on every device. Augmentation is the usual one for CIFAR (a random
crop of the image padded by 4 pixels of zeros, then a horizontal flip with probability 1/2), done
on a whole batch at once; for ImageNet it is a random 224x224 crop and a flip.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from swatfx.errors import InputError, SwatError, UnknownNameError

__all__ = ["NAMES", "Dataset", "ImageFolders", "batch_count", "batches", "load", "open_data"]

NAMES = ("digits", "cifar10", "cifar100", "fake", "imagenet")
"""Data sets by name; ``fake`` also takes a shape, as in ``fake/3x32x32/10``."""

CROP_PADDING = 4  # pixels of zeros on each side before the random crop, as usual for CIFAR

# Per-channel mean and standard deviation over all training pixels in [0, 1]. For CIFAR-10 they
# were computed from the images; the .2023/.1994/.2010 often seen is a mean of per-image values.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.305,), (0.376,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Dataset:
    """One data set, all of it in memory.

    ``train_images`` and ``test_images`` are (N, C, H, W), either uint8 in 0..255 or float32 in
    [0, 1], not normalised; ``train_labels`` and ``test_labels`` are int64 (N,) in
    0..num_classes-1. ``mean`` and ``std`` have one entry a channel, for pixels in [0, 1].
    ``augment`` says whether training batches should be cropped and flipped.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    augment: bool

    def to(self, device: torch.device | str) -> Dataset:
        """Return the same data with all tensors on ``device``."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def train_batch_count(self, batch_size: int) -> int:
        """Number of training batches in an epoch."""
        return batch_count(len(self.train_images), batch_size, shuffle=True)

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        device: torch.device | str,
        start_batch: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield shuffled, augmented (if ``augment``), normalised training batches."""
        return batches(
            self.train_images,
            self.train_labels,
            batch_size,
            seed=seed,
            epoch=epoch,
            augment=self.augment,
            device=device,
            shuffle=True,
            start_batch=start_batch,
            mean=self.mean,
            std=self.std,
        )

    def test_batches(
        self, batch_size: int, *, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised test batches in their stored order."""
        return batches(
            self.test_images,
            self.test_labels,
            batch_size,
            seed=0,
            epoch=0,
            augment=False,
            device=device,
            shuffle=False,
            mean=self.mean,
            std=self.std,
        )


def batch_count(images: int, batch_size: int, *, shuffle: bool) -> int:
    """Number of batches that :func:`batches` yields for ``images`` images.

    The last one may be short. A training epoch (``shuffle``) leaves out a last batch of one
    single image, over which batch normalisation has no variance at 1x1 pixels.
    """
    if batch_size < 1:
        raise InputError("a batch size must be at least 1", value=batch_size)
    count = math.ceil(images / batch_size)
    lonely = shuffle and batch_size > 1 and count > 1 and images % batch_size == 1
    return count - 1 if lonely else count


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augment: bool,
    device: torch.device | str,
    shuffle: bool,
    start_batch: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (float32 images (B, C, H, W), int64 labels (B,)) on ``device``.

    ``images`` is (N, C, H, W), uint8 in 0..255 or floating in [0, 1]; ``labels`` is (N,). With
    ``mean`` and ``std`` (one entry a channel) the pixels, after augmentation, are normalised.
    What batch b of an epoch holds depends on (seed, epoch, b) alone: ``start_batch`` skips the
    first batches and changes nothing about the others.
    """
    count = len(images)
    order = torch.arange(count)
    if shuffle:
        order = torch.randperm(count, generator=_generator(seed, epoch, "order"))
    order = order.to(images.device)
    if mean is None or std is None:
        mean, std = [0.0] * images.shape[1], [1.0] * images.shape[1]
    shift = torch.tensor(tuple(mean), device=device).view(1, -1, 1, 1)
    scale = torch.tensor(tuple(std), device=device).view(1, -1, 1, 1)
    for batch in range(start_batch, batch_count(count, batch_size, shuffle=shuffle)):
        chosen = order[batch * batch_size : (batch + 1) * batch_size]
        pixels = images[chosen].to(device)
        if augment:
            pixels = _crop_and_flip(pixels, _generator(seed, epoch, batch))
        whole = 255.0 if pixels.dtype == torch.uint8 else 1.0
        yield (pixels.float() / whole - shift) / scale, labels[chosen].to(device)


def _generator(seed: int, epoch: int, stream: int | str) -> torch.Generator:
    """Return a CPU generator of its own for one purpose, so that no two share random numbers."""
    return torch.Generator().manual_seed(_mixed_seed(seed, epoch, stream))


def _mixed_seed(*parts: int | str) -> int:
    # A hash and not a sum: (seed 1, epoch 0) must not repeat (seed 0, epoch 1).
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each (C, H, W) of ``pixels`` (B, C, H, W) from its padded self; flip half of them."""
    count, channels, height, width = pixels.shape
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, count, 1), generator=generator)
    flip = torch.rand((count, 1), generator=generator) < 0.5
    rows = offsets[0] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = offsets[1] + torch.where(flip, columns.flip(1), columns)
    padded = torch.nn.functional.pad(pixels, (CROP_PADDING,) * 4)
    device = pixels.device
    return padded[
        torch.arange(count, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.to(device).view(count, 1, height, 1),
        columns.to(device).view(count, 1, 1, width),
    ]


def load(name: str, root: str | pathlib.Path | None = None, *, limit: int | None = None) -> Dataset:
    """Load the data set ``name`` into memory.

    ``digits`` needs scikit-learn and no ``root``. ``cifar10`` reads torchvision's files under
    ``root``, or an .npz file (``root`` itself, or ``root``/cifar10.npz) with arrays x_train and
    x_test (uint8 [N, 3, 32, 32]), y_train and y_test; ``cifar100`` reads torchvision's files.
    ``fake`` and ``fake/CxHxW/classes`` make seeded random images and labels. ``limit`` keeps
    the first ``limit`` training and ``limit // 5`` (at least one) test images.

    Raises a :class:`SwatError` for an unknown name, a missing package, or files that are absent
    or not of the form above.
    """
    if limit is not None and limit < 1:
        raise InputError("the limit on training images must be at least 1", value=limit)
    if name == "digits":
        data = _digits()
    elif name in ("cifar10", "cifar100"):
        data = _cifar(name, root)
    elif name == "fake" or name.startswith("fake/"):
        data = _fake(name)
    elif name == "imagenet":
        raise InputError(
            "imagenet does not fit in memory", remedy="open it with swatfx.datasets.open_data"
        )
    else:
        raise UnknownNameError("data set", name, NAMES)
    if limit is None:
        return data
    tests = max(1, limit // 5)
    return replace(
        data,
        train_images=data.train_images[:limit],
        train_labels=data.train_labels[:limit],
        test_images=data.test_images[:tests],
        test_labels=data.test_labels[:tests],
    )


def _digits() -> Dataset:
    """Scikit-learn's 1797 handwritten digits, 8x8; of each class every fifth is a test image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SwatError(
            f"the data set digits needs scikit-learn, which cannot be imported: {error}",
            remedy="run pip install scikit-learn, or install swatfx[digits]",
        ) from error
    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[torch.nonzero(labels == digit).flatten()[4::5]] = True
    mean, std = _STATISTICS["digits"]
    # Digits are not augmented: a crop out of 4 pixels of padding would lose half of an 8x8 image.
    return Dataset(
        images[~test], labels[~test], images[test], labels[test], 10, mean, std, "digits", False
    )


def _cifar(name: str, root: str | pathlib.Path | None) -> Dataset:
    mean, std = _STATISTICS[name]
    class_name = name.upper()
    download = f"torchvision.datasets.{class_name}(DIR, download=True)"
    if root is None:
        raise InputError(
            f"the data set {name} is read from files and no folder was given",
            remedy=f"pass root (--data-root) DIR; {download} fills it",
        )
    root = pathlib.Path(root)
    archive = root if root.suffix == ".npz" else root / f"{name}.npz"
    if name == "cifar10" and archive.is_file():
        return Dataset(*_npz(archive), 10, mean, std, name, True)
    import torchvision.datasets as sources  # slow to import, and not needed for the others

    parts: list[Tensor] = []
    for train in (True, False):
        try:
            split = getattr(sources, class_name)(str(root), train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"no complete {name} found",
                value=str(root),
                remedy=f"call {download} once, with DIR this folder",
            ) from error
        parts.append(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous())
        parts.append(torch.tensor(split.targets, dtype=torch.int64))
    classes = 10 if name == "cifar10" else 100
    return Dataset(parts[0], parts[1], parts[2], parts[3], classes, mean, std, name, True)


def _npz(path: pathlib.Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read (train images, train labels, test images, test labels) of CIFAR-10 from an .npz."""
    remedy = "the file needs x_train, x_test (uint8 [N, 3, 32, 32]) and y_train, y_test (0..9)"
    parts: list[Tensor] = []
    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as stored:
            for split in ("train", "test"):
                parts.append(torch.from_numpy(stored[f"x_{split}"]))
                parts.append(torch.from_numpy(stored[f"y_{split}"]).long())
    except Exception as error:  # zip, zlib, header and dtype errors have no common base
        raise InputError(
            f"cannot read the data set: {error}", value=str(path), remedy=remedy
        ) from error
    for images, labels in (parts[:2], parts[2:]):
        shaped = images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        if not shaped or labels.shape != images.shape[:1] or len(labels) == 0:
            found = f"{images.dtype} {list(images.shape)}, labels {list(labels.shape)}"
            raise InputError(f"{path} holds other arrays", value=found, remedy=remedy)
        if int(labels.min()) < 0 or int(labels.max()) > 9:
            raise InputError(f"{path} holds labels outside 0..9", remedy=remedy)
    return parts[0], parts[1], parts[2], parts[3]


def _fake(name: str) -> Dataset:
    """Random uint8 images, 512 to train and 128 to test, the same at every call."""
    shape, classes = (3, 32, 32), 10
    if name != "fake":
        try:
            _, dimensions, last = name.split("/")
            channels, height, width = (int(size) for size in dimensions.split("x"))
            shape, classes = (channels, height, width), int(last)
        except ValueError as error:
            raise InputError(
                "a fake data set is named fake/CxHxW/classes",
                value=name,
                remedy="write for example fake/3x32x32/10",
            ) from error
        if min(*shape, classes) < 1:
            raise InputError("a fake data set needs positive sizes", value=name)
    generator = _generator(0, 0, name)
    parts: list[Tensor] = []
    for count in (512, 128):
        pixels = torch.randint(0, 256, (count, *shape), generator=generator)
        parts.append(pixels.to(torch.uint8))
        parts.append(torch.randint(0, classes, (count,), generator=generator))
    grey = (0.5,) * shape[0]
    spread = (0.29,) * shape[0]  # of a uniform distribution: 1 / sqrt(12)
    return Dataset(parts[0], parts[1], parts[2], parts[3], classes, grey, spread, name, True)


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
        order = torch.randperm(len(self.train), generator=_generator(seed, epoch, "order"))
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
            torch.manual_seed(_mixed_seed(self.seed, self.epoch, index))
            image, label = self.source[index]
        return image, label


def open_data(
    name: str,
    root: str | pathlib.Path | None = None,
    *,
    limit: int | None = None,
    workers: int = 0,
) -> Dataset | ImageFolders:
    """Open any data set of :data:`NAMES`: :func:`load`, or for ``imagenet`` the lazy folders.

    ``workers`` processes read the folders of ``imagenet``. Raises as :func:`load` does.
    """
    if name != "imagenet":
        return load(name, root, limit=limit)
    if root is None or not (pathlib.Path(root) / "train").is_dir():
        raise InputError(
            "imagenet needs a folder that holds train/ and val/, each with one folder a class",
            value=None if root is None else str(root),
            remedy="pass root (--data-root)",
        )
    if limit is not None:
        raise InputError("imagenet takes no limit", value=limit, remedy="pass fewer folders")
    from torchvision import datasets, transforms

    finish = [transforms.ToTensor(), transforms.Normalize(*_STATISTICS["imagenet"])]
    vary = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(256), transforms.CenterCrop(224)]
    splits = [
        datasets.ImageFolder(str(pathlib.Path(root) / folder), transforms.Compose(steps))
        for folder, steps in (("train", vary + finish), ("val", centre + finish))
    ]
    return ImageFolders(splits[0], splits[1], len(splits[0].classes), name, workers)
