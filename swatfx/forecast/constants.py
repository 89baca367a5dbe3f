"""Fitted constants: seconds of each quantity of a call's work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from swatfx.forecast.work import DENSE, DEPTHWISE, KINDS, LAYERS, PLAIN, SPARSE, Work

SIDES = (SPARSE, DENSE, PLAIN)
DTYPES = ("fp32", "bf16")
Table = Mapping[str, tuple[float, ...]]  # "dtype kind side" -> seconds of each quantity


@dataclass(frozen=True)
class Constants:
    """What a machine takes, and how well that was predicted where it was measured.

    A side is "sparse" (our kernels, tensors in "batch_innermost"), "dense" (torch's kernels on
    masked weights, row-major, packed all the same) or "plain" (the layer as torch.nn has it, in the
    faster of its two memory orders). Conversions have but one: "sparse".

    Attributes:
        table: "dtype kind side" -> seconds of each of `Work.quantities`.
        threads: that they were measured with.
        kernels: the library, as `swatfx.kernels.instruction_set()` names it.
        processor: likewise.
        date: YYYY-MM-DD.
        median_error: of predictions over measurements that were not fitted to, relative.
        worst_error: the largest of them.
    """

    table: Table
    threads: int = 1
    kernels: str = ""
    processor: str = ""
    date: str = ""
    median_error: float = math.nan
    worst_error: float = math.nan

    def seconds(self, work: Work, side: str) -> float:
        """Of one call in a training step, forward and backward."""
        rates = self.table[key(work.dtype, work.kind, side)]
        return sum(rate * q for rate, q in zip(rates, work.quantities(side), strict=True))

    def with_dense_products(self, times: float) -> Constants:
        """The same, but that torch's own bf16 products of whole matrices are so many times as
        fast: those of depthwise convolutions are none.
        """
        faster = {
            key("bf16", kind, side)
            for kind in LAYERS
            if kind != DEPTHWISE
            for side in (DENSE, PLAIN)
        }
        table = {
            name: (rates[0], rates[1] / times, *rates[2:]) if name in faster else rates
            for name, rates in self.table.items()
        }
        return replace(self, table=table)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        found = {name: getattr(self, name) for name in _FACTS}
        return {**found, "table": {name: list(rates) for name, rates in self.table.items()}}

    @staticmethod
    def from_json(data: Any) -> Constants:
        """Inverse of `to_json`.

        Raises:
            ValueError: `data` is anything else.
        """
        if not isinstance(data, dict) or set(data) != {*_FACTS, "table"}:
            raise ValueError("its fields are others")
        for name, kind in _FACTS.items():
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise ValueError(f"{name} is {data[name]!r}")
        table = data["table"]
        wanted = {name: len(work.quantities(side)) for name, work, side in _entries()}
        if not isinstance(table, dict) or set(table) != set(wanted):
            raise ValueError("its kinds of calls are others")
        for name, rates in table.items():
            if not isinstance(rates, list) or len(rates) != wanted[name]:
                raise ValueError(f"{name} has other quantities")
            if not all(_is_rate(rate) for rate in rates) or not any(rates):
                raise ValueError(f"{name} holds no seconds")
        return Constants(
            {name: tuple(map(float, rates)) for name, rates in table.items()},
            **{name: data[name] for name in _FACTS},
        )


_FACTS: dict[str, Any] = {
    "threads": int,
    "kernels": str,
    "processor": str,
    "date": str,
    "median_error": (int, float),
    "worst_error": (int, float),
}


def key(dtype: str, kind: str, side: str) -> str:
    """Name of a row of the table."""
    return f"{dtype} {kind} {side}"


def sides_of(kind: str) -> tuple[str, ...]:
    """The sides that a kind of calls has."""
    return (SPARSE,) if kind == "conversion" else SIDES


def _entries() -> list[tuple[str, Work, str]]:
    return [
        (key(dtype, kind, side), Work(kind, dtype), side)
        for dtype in DTYPES
        for kind in KINDS
        for side in sides_of(kind)
    ]


_MOST_SECONDS = 1e6  # an operation, or a byte; sums of such are finite


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < _MOST_SECONDS
