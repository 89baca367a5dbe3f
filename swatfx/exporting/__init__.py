"""A compiled model for use elsewhere: torch.export, ONNX, packed weights."""

from swatfx.exporting.writing import export, load_sparse

__all__ = [
    "export",
    "load_sparse",
]
