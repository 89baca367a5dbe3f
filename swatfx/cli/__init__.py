"""The command line."""

from swatfx.cli.commands import main

__all__ = [
    "main",
]
