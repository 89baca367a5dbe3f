"""What a training loop asks for: hooks on the optimizer, refreshes, dense weights again."""

from swatfx.training.attaching import after_load, attach, dense_state_dict, refresh, watch_loads
from swatfx.training.attachment import Handle

__all__ = [
    "Handle",
    "after_load",
    "attach",
    "dense_state_dict",
    "refresh",
    "watch_loads",
]
