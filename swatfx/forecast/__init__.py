"""How long the calls of a graph take on this machine's CPU, predicted from shapes and densities.

Numbers alone: what is said of a call is its `Work`; `Constants`, fitted by least squares to
measurements, turn it into seconds; `cheapest` chooses sides for calls that conversions tie to each
other. It knows no graph.
"""

from swatfx.forecast.choice import Call, Joint, cheapest, total
from swatfx.forecast.constants import SIDES, Constants
from swatfx.forecast.fitting import Sample, errors, fit
from swatfx.forecast.stored import Machine, made_path, path, processor, read, this_machine, write
from swatfx.forecast.work import KINDS, Work

__all__ = [
    "KINDS",
    "SIDES",
    "Call",
    "Constants",
    "Joint",
    "Machine",
    "Sample",
    "Work",
    "cheapest",
    "errors",
    "fit",
    "made_path",
    "path",
    "processor",
    "read",
    "this_machine",
    "total",
    "write",
]
