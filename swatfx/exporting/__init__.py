"""A compiled model for use elsewhere: torch.export, ONNX, packed weights."""

from swatfx.exporting.freezing import Frozen, freeze
from swatfx.exporting.writing import export, load_sparse

__all__ = [
    "Frozen",
    "export",
    "freeze",
    "load_sparse",
]
