"""Training steps timed and weighed on this machine."""

from swatfx.timing.bench import bench
from swatfx.timing.records import BenchResult

__all__ = [
    "BenchResult",
    "bench",
]
