"""What a training step costs: MACs and bytes by layer, simulated cycles, as tables."""

from swatfx.costs.eager_share import warn_of_eager
from swatfx.costs.measuring import measure
from swatfx.costs.perfetto import trace_events
from swatfx.costs.records import Report
from swatfx.costs.reporting import known_device, report
from swatfx.costs.simulation import PASSES, LayerCycles, Simulation, simulate

__all__ = [
    "LayerCycles",
    "PASSES",
    "Report",
    "Simulation",
    "known_device",
    "measure",
    "report",
    "simulate",
    "trace_events",
    "warn_of_eager",
]
