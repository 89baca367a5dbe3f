"""Data sets by name: small ones as tensors, ImageNet-like folders read lazily."""

from __future__ import annotations

import pathlib

from swatfx.datasets.batching import batch_count, batches
from swatfx.datasets.folders import ImageFolders, open_folders
from swatfx.datasets.in_memory import NAMES, Dataset, load, wants_root
from swatfx.errors import InputError

__all__ = ["NAMES", "Dataset", "ImageFolders", "batch_count", "batches", "load", "open_data"]
__all__ += ["wants_root"]


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
    if limit is not None:
        raise InputError("imagenet takes no limit", value=limit, remedy="pass fewer folders")
    return open_folders(root, workers=workers)
