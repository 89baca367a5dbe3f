"""Policies side by side on one network: counted, and trained where asked."""

from swatfx.comparing.table import Comparison, compare

__all__ = [
    "Comparison",
    "compare",
]
