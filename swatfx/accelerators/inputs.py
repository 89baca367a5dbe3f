"""Bad input is refused here, with the value and a remedy, before any model sees it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from swatfx.accelerators.geometry import Mask, Problem
from swatfx.errors import InputError


def integer(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(
            f"{name} is not an integer", value=value, remedy=f"Give an int, at least {least}"
        ) from None
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name} is too small", value=value, remedy=f"Give at least {least}")
    return number


def one_for_both(value: Any, name: str) -> int:
    """An int, or a pair of two equal ones."""
    if isinstance(value, Sequence) and len(value) == 2:
        if value[0] != value[1]:
            raise InputError(
                f"{name} differs by axis", value=value, remedy="The models take one for both axes"
            )
        value = value[0]
    return integer(value, name)


def pair(value: Any, name: str) -> tuple[int, int]:
    """A pair of ints, or one int for both."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise InputError(f"{name} is not a pair", value=value, remedy="Give (rows, columns)")
        return integer(value[0], name), integer(value[1], name)
    number = integer(value, name)
    return number, number


def sides(value: Any) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right)."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 4:
            raise InputError(
                "padding is neither an int nor four of them",
                value=value,
                remedy="Give (top, bottom, left, right); PyTorch's (p, q) is (p, p, q, q)",
            )
        top, bottom, left, right = (integer(side, "padding", 0) for side in value)
        return top, bottom, left, right
    number = integer(value, "padding", 0)
    return number, number, number, number


def mask_of(value: Any, name: str) -> Mask:
    """`value` (NumPy array, or tensor on the CPU) as a contiguous bool array."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the {name} is no array: {error}", remedy="Give a NumPy array or a CPU tensor of bools"
        ) from error
    if array.dtype != np.bool_:
        raise InputError(
            f"the {name} is not boolean",
            value=str(array.dtype),
            remedy="Masks say where the nonzeros are: pass `tensor != 0`",
        )
    if array.size == 0:
        raise InputError(
            f"the {name} has no elements",
            value=array.shape,
            remedy="Leave zero-sized layers out: they cost nothing",
        )
    return np.ascontiguousarray(array)


def weight_mask_of(value: Any) -> Mask:
    """A weight mask as [K, C, R, S]; [K, C] is a linear layer."""
    mask = mask_of(value, "weight mask")
    if mask.ndim == 2:
        mask = mask[:, :, None, None]
    if mask.ndim != 4:
        raise InputError(
            "the weight mask is not [filters, channels, rows, columns]", value=mask.shape
        )
    return mask


def planes_of(value: Any, name: str, shape: tuple[int, int, int]) -> Mask | None:
    """An activation or gradient mask of `shape`, or None."""
    if value is None:
        return None
    mask = mask_of(value, name)
    if mask.ndim == 1:
        mask = mask[:, None, None]
    if mask.shape != shape:
        raise InputError(
            f"the {name} does not fit the layer",
            value=mask.shape,
            remedy=f"It should be {shape}, for one sample",
        )
    return mask


def split(total: int, groups: int, name: str) -> int:
    """How many of `total` each group has."""
    if total % groups:
        raise InputError(
            f"{groups} groups do not divide the {name}",
            value=total,
            remedy="Give the layer's own groups",
        )
    return total // groups


def fitting(problem: Problem) -> Problem:
    """`problem`, if its kernel fits its padded input."""
    if problem.OX < 1 or problem.OY < 1:
        raise InputError(
            "the kernel is larger than its padded input: {} x {}".format(*problem.extent),
            value=problem.padded,
            remedy="Check input_hw and padding",
        )
    return problem
