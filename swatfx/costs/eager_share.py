"""How much of a model symbolic tracing left to Python, in one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from swatfx.compiled import SwatModule, all_plans
from swatfx.errors import SwatError, SwatWarning
from swatfx.meta import LayerPlan

_SHOWN = 3


def warn_of_eager(
    gm: SwatModule,
    macs: Callable[[], Mapping[str, int]] | None,
    outside: Callable[[], Mapping[str, int]],
) -> None:
    """Warn once if a part of `gm` stays eager: how many layers, what share, the first reasons.

    Args:
        gm: the compiled model.
        macs: gives the MACs of each layer and other product, where inputs are known; else weights
            are counted.
        outside: gives the elements of each matrix that is no layer's weight.
    """
    if not gm.eager:
        return
    plans, others = all_plans(gm), outside()
    below = [plan for name, plan in plans.items() if any(_is_below(name, p) for p in gm.eager)]
    dense = sum(plan.name in gm.unreached for plan in below)
    text = f"{_modules(gm)} and cannot be one graph with the rest: "
    if below:
        text += (
            f"{len(below)} of {len(plans)} layers ({_share(plans, below, macs, others)}) are below"
        )
        text += ", compiled one by one" + (f"; {dense} of them stay dense" if dense else "")
    else:
        text += "no layer is below"
    if others:
        one = len(others) == 1
        text += f"; {len(others)} matri{'x that is' if one else 'ces that are'} no weight of a conv"
        text += f" or linear layer stay{'s' if one else ''} dense"
    shown = [f"{path or 'the model'}: {_plain(why)}" for path, why in gm.eager.items()][:_SHOWN]
    more = ", ..." if len(gm.eager) > _SHOWN else ""
    text += f". {'; '.join(shown)}{more} (gm.eager tells all)"
    warnings.warn(text, SwatWarning, stacklevel=3)


def _modules(gm: SwatModule) -> str:
    count = len(gm.eager)
    if "" in gm.eager:
        return "the model itself stays eager Python"
    return f"{count} module{'s stay' if count > 1 else ' stays'} eager Python"


def _is_below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _plain(reason: str) -> str:
    return reason.removeprefix("untraceable: ")


def _share(
    plans: Mapping[str, LayerPlan],
    below: list[LayerPlan],
    macs: Callable[[], Mapping[str, int]] | None,
    others: Mapping[str, int],
) -> str:
    counts: Mapping[str, int] = {}
    if macs is not None:
        try:
            counts = macs()
        except SwatError:  # the example inputs do not run: weights can be counted all the same
            counts = {}
    total = sum(counts.values())
    if total:
        return f"{sum(counts.get(plan.name, 0) for plan in below) / total:.0%} of the MACs"
    weights = sum(plan.parameters for plan in plans.values()) + sum(others.values())
    return f"{sum(plan.parameters for plan in below) / max(weights, 1):.0%} of the weights"
