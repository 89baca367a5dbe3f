"""Pictures as data, and matplotlib to draw them where it is installed."""

from __future__ import annotations

import functools
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PANELS_A_ROW = 3


@dataclass(frozen=True)
class Line:
    """Points of one curve; `spread` is drawn as error bars, half their length.

    One y without an x is a level that the whole panel is compared with. `label` is None for
    lines that the legend shall not name.
    """

    label: str | None
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    spread: tuple[float, ...] | None = None
    colour: int = 0
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes. With `bars`, x counts rows of text labels, and values go sideways."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    bars: tuple[str, ...] = ()


@functools.cache
def _complain() -> None:
    print("no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


def draw(title: str, panels: Sequence[Panel], path: pathlib.Path) -> bool:
    """Draw the panels side by side into a PNG; False, and one line, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _complain()
        return False
    columns = min(len(panels), _PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    tallest = max([len(panel.bars) * 0.34 + 1.5 for panel in panels] + [4.2])
    figure = Figure(figsize=(6.4 * columns, tallest * rows), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 66 * columns)))
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.bars:
            axes.set_yticks(range(len(panel.bars)), panel.bars, fontsize="small")
            axes.invert_yaxis()
        if panel.log_x:
            axes.set_xscale("log")
        _add(axes, panel)
        axes.grid(alpha=0.3)
        if any(line.label for line in panel.lines):
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return True


def _add(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        colour = f"C{line.colour}"
        if panel.bars:
            count = len(panel.lines)
            height = 0.8 / count
            offsets = [x + (line.colour - (count - 1) / 2) * height for x in line.xs]
            axes.barh(offsets, line.ys, height, color=colour, label=line.label)
        elif not line.xs:
            (level,) = line.ys
            axes.axhline(level, color=colour, linestyle="--", label=line.label)
            if line.spread is not None:
                low, high = level - line.spread[0], level + line.spread[0]
                axes.axhspan(low, high, color=colour, alpha=0.1)
        else:
            axes.errorbar(
                line.xs,
                line.ys,
                line.spread,
                color=colour,
                label=line.label,
                marker=None if line.thin else "o",
                linewidth=0.7 if line.thin else 1.4,
                capsize=3,
            )
