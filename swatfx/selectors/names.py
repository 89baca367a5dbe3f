"""Selectors by name."""

from __future__ import annotations

import re

from swatfx.errors import UnknownNameError
from swatfx.policy.fields import HELD
from swatfx.selectors.base import Selector, filter_l2, l1_over
from swatfx.selectors.blocks import BLOCK, BlockSelector
from swatfx.selectors.masks import Held, NofM, RandomSelector
from swatfx.selectors.ssc import SSC, SscSelector

# Add a selector by adding a value here, or at run time with `register`.
SELECTORS: dict[str, Selector] = {
    s.name: s
    for s in (
        Selector("nchw"),
        Selector("chw", groups=("sample",)),
        Selector("hw", groups=("sample", "channel")),
        Selector("channel", l1_over(filters=False, channels=False), weights_only=True),
        Selector(
            "channel-per-filter",
            l1_over(filters=False, channels=False),
            ("sample",),
            weights_only=True,
        ),
        Selector("filter", l1_over(filters=False, channels=True), weights_only=True),
        Selector("filter-l2", filter_l2, weights_only=True),
        Selector("input-channel", l1_over(filters=True, channels=False), weights_only=True),
        RandomSelector("random"),
    )
}


def register(selector: Selector) -> None:
    """Make a selector known under its name to every policy."""
    SELECTORS[selector.name] = selector


def get(name: str) -> Selector:
    """The selector called `name`; "2:4", "block-4x1", "held:nchw" and such are made on demand.

    Raises:
        UnknownNameError: no such selector; the message lists the nearest.
        PolicyError: no such blocks, or no such pattern of SSC.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    match = re.fullmatch(r"(\d+):(\d+)", name)
    if match and 0 < int(match[1]) < int(match[2]):
        return NofM(name, weights_only=True, fixed_density=True, n=int(match[1]), m=int(match[2]))
    if name.startswith(BLOCK):
        return BlockSelector.parse(name)
    if name.startswith(SSC):
        return SscSelector.parse(name)
    if name.startswith(HELD):
        base = get(name.removeprefix(HELD))
        return Held(name, weights_only=True, fixed_density=base.fixed_density, base=base)
    raise UnknownNameError("selector", name, [*SELECTORS, "2:4", "block-4x1"])
