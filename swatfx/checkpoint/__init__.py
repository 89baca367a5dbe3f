"""Checkpoints: written whole, ended by a checksum, checked before anything is changed."""

from swatfx.checkpoint.saving import load, read_extra, save

__all__ = [
    "load",
    "read_extra",
    "save",
]
