"""The command line, run in this process."""

from __future__ import annotations

import pytest

from swatfx.cli.commands import main


def printed_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command line prints that ends well."""
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out
