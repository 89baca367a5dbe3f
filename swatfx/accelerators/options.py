"""What a simulation is told besides designs and layers."""

from __future__ import annotations

from dataclasses import dataclass

from swatfx.arguments import AMOUNT, COUNT, DENSITY, FLAG, check, whole


@dataclass(frozen=True)
class SimulationOptions:
    """Where masks come from, and what memory costs.

    Attributes:
        samples: simulate so many samples of the batch, each by itself.
        natural_density: of activations in the forward pass where no real batch was run.
        seed: of drawn masks.
        draw_weights: draw weight masks even where real weights are at hand.
        bandwidth: bytes a cycle between memory and buffers; 0 ignores memory, as the paper does.
        word_bytes: bytes of a value.

    Raises:
        InputError: a value that is none of these.
    """

    samples: int = 1
    natural_density: float = 0.5
    seed: int = 0
    draw_weights: bool = False
    bandwidth: float = 0.0
    word_bytes: int = 2

    def __post_init__(self) -> None:
        """Raise InputError for a value out of its range; names the option."""
        check(
            vars(self),
            samples=COUNT,
            natural_density=DENSITY,
            seed=whole(0, 2**62 - 1),
            draw_weights=FLAG,
            bandwidth=AMOUNT,
            word_bytes=whole(1, 1024),
        )
