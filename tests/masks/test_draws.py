"""Random draws happen on the host, whatever the device: masks are the same on all of them."""

from __future__ import annotations

import pytest
import torch

from swatfx import kernels, selectors
from swatfx.density import Density
from swatfx.masks.rules import GROWS, MaskedLayer
from swatfx.selectors import Axes

_X = torch.randn(8, 4, 3, 3)
_AXES = Axes(0, 1)


@pytest.mark.parametrize("name", ["random", "held:random"])
def test_a_drawn_mask_asks_no_other_device(name: str) -> None:
    selector = selectors.get(name)
    state = selector.state(_X, Density(0.3), _AXES, 17)
    want = selector.keep(_X, state, _AXES)
    before = torch.get_rng_state()
    # The default device stands for one whose generator draws otherwise.
    with torch.device("meta"), kernels.reference_only():
        again = selector.keep(_X, state, _AXES)
    assert not again.is_meta and torch.equal(again, want)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_grows_at_random_is_drawn_on_the_host() -> None:
    keep = torch.zeros(_X.shape, dtype=torch.bool)

    def grown() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        layer = MaskedLayer("a", _X, keep, Density(0.5), generator, lambda: keep)
        return GROWS["random"].choose(layer, 40)

    want = grown()
    assert want.sum() == 40
    with torch.device("meta"):
        again = grown()
    assert not again.is_meta and torch.equal(again, want)
