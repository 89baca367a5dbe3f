"""What happens to a compiled model between forwards: refresh, attach, and after a load."""

from __future__ import annotations

from typing import Any

from swatfx.graph_module import SwatModule


def after_load(gm: SwatModule, incompatible: Any) -> None:
    """Refresh."""
