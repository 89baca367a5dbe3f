"""swatfx: sparse weight activation training (SWAT) as a torch.fx compiler pass."""

from swatfx import models
from swatfx.checkpoint import load, save
from swatfx.density import Density
from swatfx.errors import SwatError
from swatfx.exporting import export, load_sparse
from swatfx.observing import observe
from swatfx.pipeline import compile, to_networkx
from swatfx.policy import Policy, dense, meprop, per_layer, saw, swat_er, swat_erk, swat_m, swat_u
from swatfx.reporting import Report, report
from swatfx.training import Handle, attach, dense_state_dict, refresh

__all__ = [
    "Density",
    "Handle",
    "Policy",
    "Report",
    "SwatError",
    "attach",
    "compile",
    "dense",
    "dense_state_dict",
    "export",
    "load",
    "load_sparse",
    "meprop",
    "models",
    "observe",
    "per_layer",
    "refresh",
    "report",
    "save",
    "saw",
    "swat_er",
    "swat_erk",
    "swat_m",
    "swat_u",
    "to_networkx",
]
