"""Data sets held as tensors: scikit-learn's digits, CIFAR, and random ones."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from swatfx.datasets.batching import batch_count, batches, seeded
from swatfx.errors import InputError, SwatError, UnknownNameError

NAMES = ("digits", "cifar10", "cifar100", "fake", "imagenet")
"""Data sets by name; ``fake`` also takes a shape, as in ``fake/3x32x32/10``."""

_MOST_PIXELS, _MOST_CLASSES = 2**22, 10**6  # of a fake data set: it is all in memory

# Per-channel mean and standard deviation over all training pixels in [0, 1]. For CIFAR-10 they
# were computed from the images; the .2023/.1994/.2010 often seen is a mean of per-image values.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
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
            normalise=(self.mean, self.std),
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
            normalise=(self.mean, self.std),
        )


def wants_root(name: str) -> bool:
    """Whether the data set `name` is read from a folder; others are made, or part of a package."""
    return name not in ("digits", "fake") and not name.startswith("fake/")


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
    if root is not None and not pathlib.Path(root).exists():
        raise InputError(
            "root (--data-root) is not there",
            value=str(root),
            remedy="give the folder that holds the data set's files",
        )
    if name == "digits":
        data = _digits()
    elif name in ("cifar10", "cifar100"):
        data = _cifar(name, root)
    elif not wants_root(name):
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
    mean, std = STATISTICS["digits"]
    # Digits are not augmented: a crop out of 4 pixels of padding would lose half of an 8x8 image.
    return Dataset(
        images[~test], labels[~test], images[test], labels[test], 10, mean, std, "digits", False
    )


def _cifar(name: str, root: str | pathlib.Path | None) -> Dataset:
    mean, std = STATISTICS[name]
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
    remedy = (
        "the file needs x_train, x_test (uint8 [N, 3, 32, 32]) and y_train, y_test (integers 0..9)"
    )
    parts: list[Tensor] = []
    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as stored:
            for split in ("train", "test"):
                parts.append(torch.from_numpy(stored[f"x_{split}"]))
                parts.append(torch.from_numpy(stored[f"y_{split}"]))
    except Exception as error:  # zip, zlib, header and dtype errors have no common base
        raise InputError(
            f"cannot read the data set: {error}", value=str(path), remedy=remedy
        ) from error
    for images, labels in (parts[:2], parts[2:]):
        shaped = images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        integers = not labels.dtype.is_floating_point and not labels.dtype.is_complex
        counted = integers and labels.dtype != torch.bool and labels.shape == images.shape[:1]
        if not shaped or not counted or len(labels) == 0:
            found = f"{images.dtype} {list(images.shape)}, labels {labels.dtype}"
            found += f" {list(labels.shape)}"
            raise InputError(f"{path} holds other arrays", value=found, remedy=remedy)
        if int(labels.long().min()) < 0 or int(labels.long().max()) > 9:
            raise InputError(f"{path} holds labels outside 0..9", remedy=remedy)
    return parts[0], parts[1].long(), parts[2], parts[3].long()


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
        if math.prod(shape) > _MOST_PIXELS or classes > _MOST_CLASSES:
            raise InputError(
                f"a fake data set has at most {_MOST_PIXELS} pixels an image and"
                f" {_MOST_CLASSES} classes",
                value=name,
            )
    generator = seeded(0, 0, name)
    parts: list[Tensor] = []
    for count in (512, 128):
        pixels = torch.randint(0, 256, (count, *shape), generator=generator)
        parts.append(pixels.to(torch.uint8))
        parts.append(torch.randint(0, classes, (count,), generator=generator))
    grey = (0.5,) * shape[0]
    spread = (0.29,) * shape[0]  # of a uniform distribution: 1 / sqrt(12)
    return Dataset(parts[0], parts[1], parts[2], parts[3], classes, grey, spread, name, True)
