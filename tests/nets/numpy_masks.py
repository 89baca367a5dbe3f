"""Masks in numpy, as accelerators take them."""

from __future__ import annotations

import numpy as np


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, dtype=bool)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=bool)


def magnitude_mask(index: int, percent: int, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.RandomState(1000 * index + percent).standard_normal(shape)
    flat = np.abs(values.astype(np.float32)).ravel()
    mask = zeros(flat.size)
    mask[np.argsort(-flat, kind="stable")[: flat.size - flat.size * percent // 100]] = True
    return mask.reshape(shape)
