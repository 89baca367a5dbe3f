"""Policies side by side on one network: counted, and trained where asked."""

from swatfx.comparing.rows import Comparison
from swatfx.comparing.table import compare

__all__ = [
    "Comparison",
    "compare",
]
