"""Numbers in eight or four bits, by groups: what they stand for, and what chance does to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from swatfx import kernels
from swatfx.ops.codes import BITS, GROUP, Room, decode, encode
from swatfx.tensors import layouts

OPS = torch.ops.swatfx
LAYOUTS = (layouts.ROW_MAJOR, layouts.CHANNELS_LAST, layouts.BATCH_INNERMOST)


@pytest.fixture(params=["kernels", "reference"])
def either(request: pytest.FixtureRequest) -> Iterator[None]:
    """Norms in C, then in plain torch."""
    if request.param == "kernels":
        yield
        return
    with kernels.reference_only():
        yield


def draw(shape: tuple[int, ...], layout: str, seed: int = 0) -> Tensor:
    return layouts.as_layout(torch.randn(shape, generator=torch.manual_seed(seed)), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saves", BITS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 9), (2, 3, 16, 16), (1, 2, 16, 16), (2, 1, 11, 23), (1, 1, 1, 1)], ids=str
)
def test_codes_stand_for_what_was_coded(shape: tuple[int, ...], saves: str, layout: str) -> None:
    h = draw(shape, layout)
    code = encode(h, layout, saves)
    room = Room.of(shape, saves)
    assert code.numel() == room.total and room.header % 64 == 0
    found, above = decode(code, shape, layout, saves)
    assert bool(above.all()) and layouts.lies_in(found, layout)
    root = h.abs().sqrt()
    cell = 2 * root.amax() / (2 ** BITS[saves] - 1)
    assert bool(((found - h).abs() <= cell * (2 * root + cell) + 1e-6).all())
    centred = decode(code, shape, layout, saves, centred=True)[0]
    assert float(centred.double().sum((0, 2, 3)).abs().max()) < 2.0**-22 * h.numel()


def test_bytes_by_hand() -> None:
    """One group; base 1, step 1 (exact roots of 1, 4, 9 and 16); first 0; two codes in a byte."""
    h = torch.tensor([0.0, 1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144, 169, 196, 225, 0])
    code = encode(h.view(1, 1, -1), layouts.ROW_MAJOR, "int4")
    assert code[:8].view(torch.float32).tolist() == [1, 1] and not code[8:64].any()
    pairs = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x00]
    assert code[64:].tolist() == pairs
    assert torch.equal(decode(code, (1, 1, 17), layouts.ROW_MAJOR, "int4")[0].view(-1), h)


@pytest.mark.parametrize("saves", BITS)
def test_a_border_has_a_place_of_its_own(saves: str) -> None:
    h = draw((2, 3, 16, 20), layouts.ROW_MAJOR)
    tie = torch.tensor([0.3, -9.0, 9.0])
    over = h > tie.view(-1, 1, 1)
    code = encode(h, layouts.ROW_MAJOR, saves, tie, over)
    found, above = decode(code, h.shape, layouts.ROW_MAJOR, saves)
    assert torch.equal(above, over)
    assert bool((found[:, 0][over[:, 0]] >= 0.3 - 1e-6).all())
    assert bool((found[:, 0][~over[:, 0]] <= 0.3 + 1e-6).all())


def test_outliers_spoil_no_others() -> None:
    """A thousand among ones: an even grid of their group would have cells of 4."""
    h = draw((1, 1, GROUP), layouts.ROW_MAJOR)
    plain = decode(encode(h, layouts.ROW_MAJOR, "int8"), h.shape, layouts.ROW_MAJOR, "int8")[0]
    far = h.clone()
    far[..., ::17] = 1000.0
    found = decode(encode(far, layouts.ROW_MAJOR, "int8"), h.shape, layouts.ROW_MAJOR, "int8")[0]
    others = torch.ones_like(h, dtype=torch.bool)
    others[..., ::17] = False
    error, before = ((a - h)[others].square().mean().sqrt() for a in (found, plain))
    assert float(before) < 0.01 and float(error) < 0.08
    assert float((found / far - 1)[~others].abs().max()) < 0.005


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("either")
def test_half_bytes_are_right_in_the_mean(layout: str) -> None:
    """Gradients over many draws, against those with exact saves.

    A weight's is linear in what is decoded: its mean is exact. That of the input multiplies x-hat
    by a sum that x-hat is in: with n elements a channel, its mean is off by the variance of a code
    over n, of the gradient that came; a cell is at most 2 here, and so a variance at most 1. Beside
    that the mean of K draws is off by five deviations over the root of K, at most.
    """
    shape, draws = (8, 16, 6, 7), 200
    x = draw(shape, layout).requires_grad_()
    weight = (torch.rand(16, generator=torch.manual_seed(1)) + 0.5).requires_grad_()
    bias = torch.randn(16, generator=torch.manual_seed(2)).requires_grad_()
    grad = draw(shape, layout, 3)

    def gradients(saves: str) -> list[Tensor]:
        args = (x, None, weight, bias, None, None, True, 0.1, 1e-5, True, saves)
        return list(torch.autograd.grad(OPS.batch_norm(*args)[0], (x, weight, bias), grad))

    exact = gradients("exact")
    found: list[list[Tensor]] = []
    for seed in range(draws):
        torch.manual_seed(seed)
        found.append(gradients("int4"))
    bias_of_x = grad.abs() * weight.detach().view(-1, 1, 1) * 1.1 / (8 * 42)
    for i, off in enumerate((bias_of_x, torch.zeros(16), torch.zeros(16))):
        drawn = torch.stack([g[i] for g in found]).double()
        room = 5 * drawn.std(0) / draws**0.5 + off + 1e-5
        assert bool(((drawn.mean(0) - exact[i]).abs() <= room).all()), i
    # Five deviations are not everything that an element may be off by.
    assert float((found[0][0] - exact[0]).norm() / exact[0].norm()) > 0.001


@pytest.mark.usefixtures("either")
def test_chance_follows_the_seed_and_takes_nothing_from_it() -> None:
    x = draw((8, 16, 6, 7), layouts.BATCH_INNERMOST)
    args = (x, None, None, None, None, None, True, 0.1, 1e-5, True, "int4")

    def code(seed: int) -> Tensor:
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found = OPS.batch_norm(*args)[5]
        assert torch.equal(torch.get_rng_state(), state)
        return found

    assert torch.equal(code(1), code(1)) and not torch.equal(code(1), code(2))
    torch.manual_seed(5)
    state, first = torch.get_rng_state(), code(5)
    code(6)
    torch.set_rng_state(state)  # as checkpoints do
    assert torch.equal(OPS.batch_norm(*args)[5], first)
