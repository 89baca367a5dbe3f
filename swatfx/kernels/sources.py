"""A digest of the C sources: which of them a library was built from.

A library whose sources have moved on reads other structures than it is handed. Used by the loader,
and by setup.py, which runs this file by itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "csrc"


def digest() -> str:
    """Sixteen hexadecimal digits over the names and contents of all files in csrc."""
    total = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.[ch]")):
        name = path.relative_to(FOLDER).as_posix()
        total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
