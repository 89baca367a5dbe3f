"""torchvision's models by name, and which of them the fast tests take."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torchvision import models as tv

from swatfx import models

CLASSIFIERS = tv.list_models(module=tv)


def create(name: str, **kwargs: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        kwargs["init_weights"] = False  # minutes of truncated normals
    return models.create(name, **kwargs)


def fast(names: list[str], chosen: set[str]) -> list[Any]:
    return [n if n in chosen else pytest.param(n, marks=pytest.mark.slow) for n in names]
