"""A compiled model for use elsewhere: torch.export, ONNX, packed weights, a smaller network."""

from swatfx.exporting.freezing import Frozen, freeze
from swatfx.exporting.loading import load_program
from swatfx.exporting.packing import VALUES
from swatfx.exporting.shrinking import Shrunk, ShrunkLayer, shrink
from swatfx.exporting.sparse_file import load_sparse
from swatfx.exporting.writing import export

__all__ = [
    "Frozen",
    "Shrunk",
    "ShrunkLayer",
    "VALUES",
    "export",
    "freeze",
    "load_program",
    "load_sparse",
    "shrink",
]
