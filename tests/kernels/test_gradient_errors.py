"""What storing less costs in precision: gradients, as swatfx/kernels/README.md gives them.

`pytest -s -m '' tests/kernels/test_gradient_errors.py` prints what it measures. A step on random
images, SWAT-U at 90%: gradients with other `norm_saves` or `value_dtype="bf16"` against those
without.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swatfx
from swatfx import models

SHAPES = {"cifar/resnet20": (32, 3, 32, 32), "resnet18": (32, 3, 64, 64)}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "int8": {"norm_saves": "int8"},
    "int4": {"norm_saves": "int4"},
    "bf16": {"value_dtype": "bf16"},
}


@lru_cache(maxsize=2)
def gradients(name: str, option: str, seed: int, outlier: float) -> dict[str, Tensor]:
    """Those of one step; `outlier` replaces one value of the images."""
    torch.manual_seed(seed)
    model = models.create(name, num_classes=10)
    gm = swatfx.compile(model, "swat-u:0.9", **OPTIONS[option])
    x = torch.randn(SHAPES[name])
    if outlier:
        x[0, 0, 5, 5] = outlier
    F.cross_entropy(gm(x), torch.arange(len(x)) % 10).backward()
    return {n: p.grad.double() for n, p in gm.named_parameters() if p.grad is not None}


def errors(name: str, option: str, seed: int, outlier: float) -> tuple[float, float]:
    """(of all gradients as one vector, of the worst parameter), relative to their norms."""
    exact = gradients(name, "exact", seed, outlier)
    found = gradients(name, option, seed, outlier)
    squares = {n: (found[n] - g).square().sum() for n, g in exact.items()}
    sizes = {n: g.square().sum() for n, g in exact.items()}
    whole = (sum(squares.values(), torch.zeros(())) / sum(sizes.values(), torch.zeros(()))).sqrt()
    worst = max((squares[n] / sizes[n]).sqrt().item() for n in exact if sizes[n] > 0)
    print(f"{name} {option} seed {seed} outlier {outlier:g}: {whole:.3%}, worst {worst:.3%}")
    return whole.item(), worst


# (option, outlier): (least, most of all gradients; least, most of the worst parameter), fractions.
BOUNDS = {
    ("int8", 0): (0.0004, 0.0025, 0.007, 0.02),
    ("int8", 100): (0.0005, 0.008, 0.007, 0.02),
    ("int8", 1000): (0.0015, 0.015, 0.007, 0.02),
    ("int4", 0): (0.009, 0.08, 0.15, 0.7),
    ("int4", 1000): (0.03, 0.3, 0.15, 1.0),
    ("bf16", 0): (0.0008, 0.0030, 0.0012, 0.0030),
    ("bf16", 1000): (0.0008, 0.0030, 0.0012, 0.0030),
}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("cifar/resnet20", 0),
        *[pytest.param("cifar/resnet20", seed, marks=pytest.mark.slow) for seed in (1, 2)],
        *[pytest.param("resnet18", seed, marks=pytest.mark.slow) for seed in (0, 1, 2)],
    ],
)
def test_errors_are_as_documented(name: str, seed: int) -> None:
    """Within a factor of about two of what was measured; int8 below 2%, whatever the outlier."""
    for (option, outlier), (least, most, least_worst, most_worst) in BOUNDS.items():
        whole, worst = errors(name, option, seed, outlier)
        assert least < whole < most, (option, outlier, whole)
        assert least_worst < worst < most_worst, (option, outlier, worst)
