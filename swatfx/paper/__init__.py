"""The paper's tables 1 and 6, from the policies' fields and the cycle models."""

from swatfx.paper.table6 import page, table6_trained

__all__ = [
    "page",
    "table6_trained",
]
