"""What a training loop asks for: hooks on the optimizer, refreshes, dense weights again."""

from swatfx.training.attaching import after_load, attach, dense_state_dict, refresh, watch_loads
from swatfx.training.attachment import Handle
from swatfx.training.telling import TrainingObserver, observe_training

__all__ = [
    "Handle",
    "TrainingObserver",
    "after_load",
    "attach",
    "dense_state_dict",
    "observe_training",
    "refresh",
    "watch_loads",
]
