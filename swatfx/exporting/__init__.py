"""A compiled model for use elsewhere: torch.export, ONNX, packed weights, a smaller network."""

from swatfx.exporting.shrinking import Shrunk, ShrunkLayer, shrink
from swatfx.exporting.writing import export, load_sparse

__all__ = [
    "Shrunk",
    "ShrunkLayer",
    "export",
    "load_sparse",
    "shrink",
]
