"""Selectors: which elements of a tensor Top-K keeps (paper section 3.3.1, appendix A.5).

A selector turns a tensor and a density into a small *state* (a threshold, or a bitmask) when
thresholds are refreshed, and a tensor and a state into a mask whenever the tensor is used. An
element is kept unless its score is below the threshold: ties stay, and so does NaN, so that it
reaches the loss.

Tensors are described by `spatial`, the number of spatial dimensions: activations are
(N, C, *spatial) or (C, *spatial); with `spatial` 0, (*any, C) of a linear layer. Weights are
(F, C, *kernel).
"""

from swatfx.policy.fields import HELD
from swatfx.selectors.base import Axes, Selector
from swatfx.selectors.blocks import BlockNorm, BlockSelector
from swatfx.selectors.masks import Held, NofM, RandomSelector
from swatfx.selectors.names import SELECTORS, get, register

__all__ = [
    "HELD",
    "SELECTORS",
    "Axes",
    "BlockNorm",
    "BlockSelector",
    "Held",
    "NofM",
    "RandomSelector",
    "Selector",
    "get",
    "register",
]
