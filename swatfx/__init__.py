"""swatfx: sparse weight activation training (SWAT) as a torch.fx compiler pass."""

from swatfx import models
from swatfx.checkpoint import load, save
from swatfx.comparing import Comparison, compare
from swatfx.compiled import observe
from swatfx.costs import Report, report
from swatfx.density import Density
from swatfx.errors import SwatError, SwatWarning
from swatfx.exporting import export, freeze, load_program, load_sparse, shrink
from swatfx.pipeline import compile, to_networkx
from swatfx.policy import (
    Policy,
    dense,
    dsr,
    dst,
    forward_activations,
    forward_weights,
    gradual_magnitude,
    meprop,
    per_layer,
    rigl,
    saw,
    set_,
    snfs,
    soft_filter,
    ssc,
    static,
    swat_active_update,
    swat_er,
    swat_erk,
    swat_frozen,
    swat_m,
    swat_u,
)
from swatfx.timing import BenchResult, bench
from swatfx.training import Handle, attach, dense_state_dict, observe_training, refresh
from swatfx.tuning import tune
from swatfx.version import __version__

__all__ = [
    "BenchResult",
    "Comparison",
    "Density",
    "Handle",
    "Policy",
    "Report",
    "SwatError",
    "SwatWarning",
    "__version__",
    "attach",
    "bench",
    "compare",
    "compile",
    "dense",
    "dense_state_dict",
    "dsr",
    "dst",
    "export",
    "forward_activations",
    "forward_weights",
    "freeze",
    "gradual_magnitude",
    "load",
    "load_program",
    "load_sparse",
    "meprop",
    "models",
    "observe",
    "observe_training",
    "per_layer",
    "refresh",
    "report",
    "rigl",
    "save",
    "saw",
    "set_",
    "shrink",
    "snfs",
    "soft_filter",
    "ssc",
    "static",
    "swat_active_update",
    "swat_er",
    "swat_erk",
    "swat_frozen",
    "swat_m",
    "swat_u",
    "to_networkx",
    "tune",
]
