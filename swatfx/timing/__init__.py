"""Training steps timed and weighed on this machine."""

from swatfx.timing.kernel_times import FitResult, fit_kernel_times
from swatfx.timing.measuring import ROUNDS, SECONDS, bench
from swatfx.timing.records import BenchResult
from swatfx.timing.steps import DTYPES

__all__ = [
    "BenchResult",
    "DTYPES",
    "FitResult",
    "ROUNDS",
    "SECONDS",
    "bench",
    "fit_kernel_times",
]
