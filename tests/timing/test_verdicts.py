"""What a bench says of its figures: faster, as fast, or slower, and which layers lose."""

from __future__ import annotations

import pytest

from swatfx.timing.records import LayerTime, verdict_on
from tests.nets.timed_nets import layer, span

OURS, DENSE = "bf16 swat-u:0.9", "bf16 channels_last, eager"
RIVAL = f"the fastest dense form ({DENSE})"
LAYERS = [layer("a", 0.010, 0.020), layer("b", 0.020, 0.010), layer("c", 0.030, 0.005)]
LOSERS = [layer(f"l{i}", 0.010 + i / 1000, 0.010) for i in range(8)]
EVEN = [LayerTime("other", seconds=0.01, dense_seconds=0.01)]
SLOW = [LayerTime("other", seconds=0.09, dense_seconds=0.01)]


def test_faster() -> None:
    said = verdict_on(OURS, DENSE, span(1.4, 1.58, 1.7), LAYERS, EVEN)
    assert said == f"{OURS} trains 1.58 times as fast as {RIVAL}"


def test_within_the_spread() -> None:
    said = verdict_on(OURS, DENSE, span(0.8, 1.02, 1.3), LAYERS, EVEN)
    assert said == (
        f"{OURS} is as fast as {RIVAL} within the spread (1.02 times as fast, 0.80 to 1.30)"
    )


@pytest.mark.parametrize(
    ("layers", "rest", "losing"),
    [
        (LAYERS, EVEN, "the layers that lose are c, b"),
        (LAYERS[:2], EVEN, "the layer that loses is b"),
        (LAYERS[:1], EVEN, "no layer loses much"),
        (
            LAYERS[:1],
            SLOW,
            "no layer loses much, what lies between the layers takes 80 ms more",
        ),
        (
            LAYERS,
            SLOW,
            "the layers that lose are c, b, and what lies between the layers takes 80 ms more",
        ),
        (LOSERS, EVEN, "the layers that lose are l7, l6, l5, l4, l3 and 2 more"),
        ([layer("seen here alone", 1.0, None)], EVEN, "no layer loses much"),
    ],
)
def test_slower(layers: list[LayerTime], rest: list[LayerTime], losing: str) -> None:
    said = verdict_on(OURS, DENSE, span(0.4, 0.5, 0.6), layers, rest)
    assert said == f"{OURS} takes 2.00 times as long as {RIVAL}: stay dense; {losing}"
