"""Held masks: what an update drops and grows, when, and what becomes of the optimizer's state."""

from swatfx.masks.joint_updates import JointUpdate
from swatfx.masks.optimizers import (
    Optimizer,
    Owners,
    StepWatch,
    check_momentum,
    held_by,
    momentum_of,
    optimizers_of,
    overflowed,
)
from swatfx.masks.rules import (
    DROPS,
    GROWS,
    SHARES,
    DropRule,
    GrowRule,
    MaskedLayer,
    by_score,
    check_rules,
    drop_count,
    needs,
    share_out,
)
from swatfx.masks.schedule import Schedule
from swatfx.masks.updates import MaskUpdater, check_ranks, check_weights
from swatfx.selectors.topk import largest

__all__ = [
    "DROPS",
    "DropRule",
    "GROWS",
    "GrowRule",
    "JointUpdate",
    "MaskUpdater",
    "MaskedLayer",
    "Optimizer",
    "Owners",
    "SHARES",
    "Schedule",
    "StepWatch",
    "by_score",
    "check_momentum",
    "check_ranks",
    "check_rules",
    "check_weights",
    "drop_count",
    "held_by",
    "largest",
    "momentum_of",
    "needs",
    "optimizers_of",
    "overflowed",
    "share_out",
]
