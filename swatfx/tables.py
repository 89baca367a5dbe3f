"""Tables and the notes below them, as people and programs read them.

What a command prints is `Shown`: blocks to read, records for CSV, data for JSON.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from swatfx.errors import InputError

FORMATS = ("table", "markdown", "csv", "json", "latex", "html")
# Of tabulate's simple format: characters between columns, and at least so many behind a heading.
_GAP, _BEHIND = 2, 2
_LONGEST_WORD = 24  # longer ones are broken where a table is too wide
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
_STYLE = (
    ":root{color-scheme:light dark}body{font:14px/1.4 system-ui,sans-serif;margin:1.5em}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "th,td{padding:.2em .7em;text-align:left;border-bottom:1px solid #8886}"
)


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    Attributes:
        columns: their names.
        rows: a cell a column; None is shown as nothing.
        title: a line above it, or nothing.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""

    @staticmethod
    def of(columns: Mapping[str, Sequence[Any]], title: str = "") -> Table:
        """From the cells of each column."""
        return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), title)

    def to_text(self, width: int | None = None) -> str:
        """For a terminal; at most `width` characters wide, if that is given.

        What does not fit is wrapped, and what then does not is shown in several tables, one below
        the other, each with the first column.
        """
        table = self._styled("simple")
        if width is not None and max(map(len, table.splitlines())) > width:
            table = "\n\n".join(self._fitted(width))
        return f"{self.title}\n{table}" if self.title else table

    def to_markdown(self) -> str:
        """As GitHub reads it."""
        table = self._styled("github")
        return f"{self.title}\n\n{table}" if self.title else table

    def to_csv(self) -> str:
        """A line of names, and a line a row."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return out.getvalue()

    def to_latex(self) -> str:
        """A floating table; wants the package booktabs."""
        caption = [f"\\caption{{{_latex(self.title)}}}"] if self.title else []
        table = self._styled("latex_booktabs")
        return "\n".join(["\\begin{table}", "\\centering", *caption, table, "\\end{table}"])

    def to_html(self) -> str:
        """An element, or two with the title's."""
        title = f"<h3>{html.escape(self.title)}</h3>\n" if self.title else ""
        return title + self._styled("html")

    def _styled(self, style: str) -> str:
        return tabulate(self._cells(), self.columns, tablefmt=style, disable_numparse=True)

    def _cells(self) -> list[list[str]]:
        return [["" if cell is None else str(cell) for cell in row] for row in self.rows]

    def _fitted(self, width: int) -> Iterable[str]:
        cells = self._cells()
        most, least = [], []
        for i, name in enumerate(self.columns):
            column = ["", *(row[i] for row in cells)]
            words = [word for cell in column for word in cell.split()]
            most.append(max(len(name) + _BEHIND, *map(len, column)))
            longest = max((len(word) + _BEHIND for word in name.split()), default=0)
            least.append(min(max(longest, *map(len, ["", *words])), _LONGEST_WORD))
        groups, taken = [[0]], least[0]
        for i in range(1, len(most)):
            if taken + _GAP + least[i] > width and groups[-1] != [0]:
                groups.append([0])
                taken = least[0]
            groups[-1].append(i)
            taken += _GAP + least[i]
        for group in groups:
            left = width - sum(least[i] for i in group) - _GAP * (len(group) - 1)
            widths = {}
            for i in sorted(group, key=lambda i: most[i] - least[i]):  # few wrapped, if any
                more = max(min(most[i] - least[i], left), 0)
                widths[i], left = max(least[i] + more, 1), left - more
            yield tabulate(
                [[row[i] for i in group] for row in cells],
                [self.columns[i] for i in group],
                tablefmt="simple",
                disable_numparse=True,
                maxcolwidths=[widths[i] for i in group],
                maxheadercolwidths=[max(widths[i] - _BEHIND, 1) for i in group],
            )


class Shown:
    """What can be shown in each of `FORMATS`."""

    def blocks(self) -> Sequence[Table | str]:
        """Tables and lines of text, in the order in which they are read."""
        raise NotImplementedError

    def records(self) -> Table:
        """What CSV holds."""
        raise NotImplementedError

    def data(self) -> Any:
        """What JSON holds."""
        raise NotImplementedError

    def render(self, form: str, width: int | None = None) -> str:
        """In the format called `form`; "table" at most `width` characters wide, if it is given."""
        if form == "table":
            return self.to_text(width)
        if form not in FORMATS:
            raise InputError("unknown format", value=form, remedy=f"use one of {FORMATS}")
        text: str = getattr(self, f"to_{form}")()
        return text

    def to_text(self, width: int | None = None) -> str:
        """For a terminal, see `Table.to_text`."""
        lines: list[str] = []
        after_table = False
        for block in self.blocks():
            is_table = isinstance(block, Table)
            if lines and (is_table or after_table):
                lines.append("")
            lines.append(block.to_text(width) if isinstance(block, Table) else block)
            after_table = is_table
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Tables as GitHub reads them, and paragraphs."""
        return "\n\n".join(
            block.to_markdown() if isinstance(block, Table) else block.replace("*", "\\*")
            for block in self.blocks()
        )

    def to_csv(self) -> str:
        """The records."""
        return self.records().to_csv()

    def to_json(self) -> str:
        """The data."""
        return json.dumps(self.data(), indent=1)

    def to_latex(self) -> str:
        """Floating tables and paragraphs; wants the package booktabs."""
        return "\n\n".join(
            block.to_latex() if isinstance(block, Table) else _latex(block)
            for block in self.blocks()
        )

    def to_html(self) -> str:
        """A page that needs nothing else."""
        head = f'<!doctype html>\n<meta charset="utf-8">\n<title>swatfx</title>\n<style>{_STYLE}'
        return f"{head}</style>\n{self._repr_html_()}\n"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return "\n".join(
            block.to_html() if isinstance(block, Table) else f"<p>{html.escape(block)}</p>"
            for block in self.blocks()
        )

    def __str__(self) -> str:
        return self.to_text()


@dataclass(frozen=True)
class Page(Shown):
    """What is shown by its parts, as those of `Shown`."""

    shown: tuple[Table | str, ...]
    table: Table
    values: Any

    def blocks(self) -> Sequence[Table | str]:
        """As it was made of."""
        return self.shown

    def records(self) -> Table:
        """As it was made of."""
        return self.table

    def data(self) -> Any:
        """As it was made of."""
        return self.values


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
