"""Whole trainings in a folder, that can be killed and resumed."""

from swatfx.runs.config import RunConfig, RunResult
from swatfx.runs.folder import CHECKPOINT, CONFIG, METRICS, FolderInUseError
from swatfx.runs.recipes import Recipe, learning_rate, make_optimizer, recipe_for, recipe_named
from swatfx.runs.run import train_run

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "FolderInUseError",
    "METRICS",
    "Recipe",
    "RunConfig",
    "RunResult",
    "learning_rate",
    "make_optimizer",
    "recipe_for",
    "recipe_named",
    "train_run",
]
