"""Tables for people and programs: every command in every format, fitted to a terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from swatfx import cli
from swatfx.errors import InputError
from swatfx.tables import FORMATS, Page, Table

WORDS = Table(
    ("name", "a long heading of words", "why"),
    (("one", 12345, "since it was so <before> & after"), ("two_2", None, "50% of $x^2$ ~ #{}\\")),
    "A title",
)
PAGE = Page((WORDS, "a note with *stars* & <signs>", "another"), WORDS, {"rows": [1, 2]})
COMMANDS = {
    "report": ("report", "cifar/resnet18", "--policy", "swat-u:0.9", "--batch-size", "2"),
    "compare": ("compare", "cifar/resnet18", "--policies", "swat-u:0.9,dense", "--batch-size", "2"),
    "simulate": ("simulate", "digits/cnn", "--accelerator", "scnn"),
    "sweep": ("simulate", "digits/cnn", "--sweep", "sparsity=0,0.5"),
    "policies": ("policies",),
    "table1": ("policies", "--table1"),
    "models": ("models",),
}


class Parsed(HTMLParser):
    """Checks that elements are closed in order; counts rows and gathers text."""

    EMPTY = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows, self.words = 0, ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.rows += tag == "tr"
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_every_format(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {}
    for form in FORMATS:
        path = tmp_path / form
        assert cli.main([*COMMANDS[command], "--format", form, "--output", str(path)]) == 0
        assert capsys.readouterr().out == ""
        told[form] = path.read_text()
    assert cli.main([*COMMANDS[command], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(told["json"])
    records = list(csv.DictReader(io.StringIO(told["csv"])))
    assert records and all(None not in record for record in records)
    page = Parsed(told["html"])
    assert told["html"].startswith("<!doctype html>") and "http" not in told["html"]
    if command != "models":
        assert page.rows > 1 and "\\toprule" in told["latex"] and "|---" in told["markdown"]
        assert told["latex"].count("\\begin{table}") == told["latex"].count("\\end{table}") > 0
    first = next(word for word in re.split(r"\s+", told["table"]) if word)
    assert first in page.words and first in told["markdown"]


def test_signs_are_escaped() -> None:
    latex, text = PAGE.to_latex(), PAGE.to_html()
    assert r"50\% of \$x" in latex and r"two\_2" in latex and r"\& " in latex
    assert "<before>" not in text and "<before>" in Parsed(text).words
    assert r"\*stars\*" in PAGE.to_markdown() and "*stars*" in PAGE.to_text()
    assert "A title" in Parsed(PAGE._repr_html_()).words
    assert "\\caption{A title}" in latex


def test_csv_has_values_and_text_has_cells() -> None:
    rows = list(csv.reader(io.StringIO(PAGE.to_csv())))
    assert rows[0] == list(WORDS.columns) and rows[1][1] == "12345" and rows[2][1] == ""
    assert json.loads(PAGE.to_json()) == {"rows": [1, 2]}
    assert str(PAGE) == PAGE.to_text() and PAGE.to_text().splitlines()[0] == "A title"
    with pytest.raises(InputError, match="unknown format"):
        PAGE.render("pdf")


@pytest.mark.parametrize("width", [200, 60, 40, 26])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = WORDS.to_text(width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for word in ("one", "12345", "<before>", "heading", "two_2"):
        assert word in words
    assert (text == WORDS.to_text()) == (width == 200)


def test_what_does_not_fit_is_told_below_with_the_first_column() -> None:
    columns = {"layer": ["a", "b"], **{f"figure{i}": [str(i) * 9, "x"] for i in range(20)}}
    text = Table.of(columns).to_text(80)
    assert max(map(len, text.splitlines())) <= 80
    heads = [line for line in text.splitlines() if line.startswith("layer")]
    assert len(heads) > 2 and " ".join(heads).replace("layer", "").split() == list(columns)[1:]


@pytest.mark.parametrize("columns", [80, 120])
def test_commands_fit_a_terminal(columns: int) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "swatfx", *COMMANDS["report"]]
    environment = os.environ | {"COLUMNS": str(columns)}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        told = b""
        while True:
            try:
                read = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not read:
                break
            told += read
    os.close(ours)
    assert process.returncode == 0
    lines = told.decode().splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("policy swat"))]
    assert max(map(len, table)) <= columns and any(line.startswith("layer") for line in table)
