"""swatfx: sparse weight activation training (SWAT) as a torch.fx compiler pass."""

from swatfx.pipeline import compile, to_networkx
from swatfx.policy import Policy, dense, meprop, per_layer, saw, swat_er, swat_erk, swat_m, swat_u

__all__ = [
    "Policy",
    "compile",
    "dense",
    "meprop",
    "per_layer",
    "saw",
    "swat_er",
    "swat_erk",
    "swat_m",
    "swat_u",
    "to_networkx",
]
