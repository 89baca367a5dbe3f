"""The ops of `swatfx.ops` made fast on CPUs, in C behind ctypes.

Importing this package registers them; nothing calls them by name. Where no library was built, or
SWATFX_KERNELS=reference, the plain-torch kernels, which define every op, stay in charge.
"""

from swatfx.kernels import (
    coded,
    conv,
    elementwise,
    layer_norm,
    layout,
    linear,
    norm,
    pack,
    pool,
    topk,
)
from swatfx.kernels.fitting import LARGEST_KERNEL, LARGEST_STRIDE
from swatfx.kernels.library import available, instruction_set, reference_only

__all__ = [
    "LARGEST_KERNEL",
    "LARGEST_STRIDE",
    "available",
    "coded",
    "conv",
    "elementwise",
    "instruction_set",
    "layer_norm",
    "layout",
    "linear",
    "norm",
    "pack",
    "pool",
    "reference_only",
    "topk",
]
