"""The same density in every layer (paper section 3.3.2, SWAT-U)."""

from collections.abc import Sequence

from swatfx.density import Density


def uniform(shapes: Sequence[tuple[int, ...]], density: Density) -> list[Density]:
    """`density` for each of `shapes`."""
    return [density for _ in shapes]
