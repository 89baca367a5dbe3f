"""Batches of images in memory: their order and augmentation, functions of the seed alone.

A training run that is resumed must continue bit for bit, so nothing here draws from the global
random state: the order of an epoch and the augmentation of a batch are pure functions of
(seed, epoch, batch index), on every device. Augmentation is the usual one for CIFAR (a random
crop of the image padded by 4 pixels of zeros, then a horizontal flip with probability 1/2), done
on a whole batch at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from swatfx.errors import InputError

CROP_PADDING = 4  # pixels of zeros on each side before the random crop, as usual for CIFAR


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
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (float32 images (B, C, H, W), int64 labels (B,)) on ``device``.

    ``images`` is (N, C, H, W), uint8 in 0..255 or floating in [0, 1]; ``labels`` is (N,).
    ``normalise`` is mean and deviation, one entry a channel each: pixels, after augmentation, are
    normalised by them.
    What batch b of an epoch holds depends on (seed, epoch, b) alone: ``start_batch`` skips the
    first batches and changes nothing about the others.
    """
    count = len(images)
    order = torch.arange(count)
    if shuffle:
        order = torch.randperm(count, generator=seeded(seed, epoch, "order"))
    order = order.to(images.device)
    channels = images.shape[1]
    mean, std = normalise or ([0.0] * channels, [1.0] * channels)
    shift = torch.tensor(tuple(mean), device=device).view(1, -1, 1, 1)
    scale = torch.tensor(tuple(std), device=device).view(1, -1, 1, 1)
    for batch in range(start_batch, batch_count(count, batch_size, shuffle=shuffle)):
        chosen = order[batch * batch_size : (batch + 1) * batch_size]
        pixels = images[chosen].to(device)
        if augment:
            pixels = _crop_and_flip(pixels, seeded(seed, epoch, batch))
        whole = 255.0 if pixels.dtype == torch.uint8 else 1.0
        yield (pixels.float() / whole - shift) / scale, labels[chosen].to(device)


def seeded(seed: int, epoch: int, stream: int | str) -> torch.Generator:
    """A CPU generator of its own for one purpose, so that no two share random numbers."""
    return torch.Generator().manual_seed(mixed_seed(seed, epoch, stream))


def mixed_seed(*parts: int | str) -> int:
    """One seed out of several parts."""
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
