"""Accelerators: known points, and integers worked by hand for every model."""

import numpy as np
import pytest

from swatfx.accelerators import (
    SCNN,
    Ampere,
    BitTactical,
    CambriconX,
    Cnvlutin,
    DenseTile,
    Ideal,
    Systolic,
    TensorDash,
    ceil_div,
)
from swatfx.accelerators.schedule import candidates
from swatfx.errors import InputError
from tests.nets.numpy_masks import magnitude_mask, ones, zeros

# 17 filters, 33 channels, 5x5, stride 2, padding 2 at 11 x 9: output 6 x 5
ODD = dict(input_hw=(11, 9), stride=2, padding=2)
ODD_SHAPE = (17, 33, 5, 5)


# -- known points ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index, shape, size, dense, cycles",
    [
        (2, (64, 64, 3, 3), 56, 112896, {50: 75264, 80: 59584, 90: 47040}),
        (8, (1024, 256, 1, 1), 14, 12544, {50: 9408, 80: 6860, 90: 6272}),
    ],
)
def test_bit_tactical_known_points(index, shape, size, dense, cycles) -> None:
    for percent, expected in cycles.items():
        mask = magnitude_mask(index, percent, shape)
        got = BitTactical().conv_cycles(mask, input_hw=(size, size), padding=shape[2] // 2)
        assert (got.cycles, got.dense_cycles, got.own_dense_cycles) == (expected, dense, dense)
        assert got.speedup == dense / expected == got.own_speedup


@pytest.mark.parametrize("dataflow, cycles", [("os", (24695, 149439)), ("ws", (12919, 329471))])
def test_systolic_known_points(dataflow, cycles) -> None:
    design = Systolic(32, 32, dataflow)
    assert design.conv_cycles(ones(64, 64, 1, 1), input_hw=(56, 56)).cycles == cycles[0]
    got = design.conv_cycles(ones(512, 512, 3, 3), input_hw=(7, 7), padding=1)
    assert got.cycles == cycles[1]


# -- by hand ---------------------------------------------------------------------------------------


def test_dense_tile_by_hand() -> None:
    got = DenseTile().conv_cycles(zeros(*ODD_SHAPE), **ODD)
    assert got.cycles == got.dense_cycles == got.own_dense_cycles == 30 * 1 * 3 * 25
    assert got.multiplications == 0 and got.utilisation == 0
    assert DenseTile(columns=16).conv_cycles(ones(*ODD_SHAPE), **ODD).cycles == 2 * 3 * 25
    assert got.full_slot_cycles == ceil_div(17 * 33 * 25 * 30, 4096)
    assert got.note == "dense: this design cannot skip here"
    # 3 channels, stride 2: 12 channels, 7x7 -> 4x4
    stem = DenseTile().conv_cycles(ones(64, 3, 7, 7), input_hw=(224, 224), stride=2, padding=3)
    assert stem.cycles == 112 * 112 * 16
    plain = DenseTile().conv_cycles(ones(64, 3, 3, 3), input_hw=(8, 8), padding=1)
    assert plain.cycles == 64 * 9


def test_multiplications_by_hand() -> None:
    # 3x3 on 3x3 with padding 1: the corner windows meet 4, the edges 6, the middle 9
    got = Ideal(10).conv_cycles(ones(1, 1, 3, 3), input_hw=(3, 3), padding=1)
    assert got.multiplications == 4 * 4 + 4 * 6 + 9 == 49
    assert got.cycles == got.own_dense_cycles == 5 and got.full_slot_cycles == 9
    assert got.utilisation == 49 / 50
    centre = zeros(1, 3, 3)
    centre[0, 1, 1] = True
    got = Ideal(10).conv_cycles(ones(2, 1, 3, 3), centre, input_hw=(3, 3), padding=1)
    assert got.multiplications == 2 * 9


def test_bit_tactical_by_hand() -> None:
    # 75 rows: all zero, two are skipped and one is issued, 25 times
    got = BitTactical().conv_cycles(zeros(*ODD_SHAPE), **ODD)
    assert got.cycles == 30 * 25 and got.dense_cycles == 30 * 75
    one = zeros(*ODD_SHAPE)
    one[16, 0, 0, 0] = True  # row 0 of the second tile: issued, then rows 3, 6, ... 72
    assert BitTactical().conv_cycles(one, **ODD).cycles == 30 * 25
    # an issued row of zeros may take values: row 3 takes row 5's, then 4 and 5 are skipped
    two = zeros(1, 16, 3, 2)
    two[0, 5, 0, 0] = two[0, 5, 2, 1] = True  # rows 0 and 1 * 3 + 2 = 5
    assert BitTactical().conv_cycles(two, input_hw=(3, 2)).cycles == 2
    # rows are ordered S, R: full rows 0 and 3 are issued, the others skipped (R, S: rows 0, 1, 4)
    full = zeros(1, 16, 3, 2)
    full[:, :, 0] = True
    assert BitTactical().conv_cycles(full, input_hw=(3, 2)).cycles == 2
    # row 0 full in the even lanes, row 1 too: odd lanes take from their neighbours
    even = zeros(1, 32, 1, 1)
    even[0, ::2] = True
    assert BitTactical().conv_cycles(even, input_hw=(1, 1)).cycles == 1
    # L<1,0> cannot move across lanes: both rows are issued
    assert BitTactical(1, 0, "L").conv_cycles(even, input_hw=(1, 1)).cycles == 2
    # 17 channels: lanes 1 to 15 of the second row are padding, its one value moves up
    half = ones(1, 17, 1, 1)
    assert BitTactical().conv_cycles(half, input_hw=(2, 2)).cycles == 4 * 2
    half[0, 3] = False  # lane 0 of row 1 to lane 3 of row 0 is out of T<2,5>'s reach: it takes
    half[0, 15] = False  # lane + 1 = 0 mod 16
    assert BitTactical().conv_cycles(half, input_hw=(2, 2)).cycles == 4 * 1


def test_bit_tactical_groups_of_tiles_wait_for_the_slowest() -> None:
    weights = zeros(272, 48, 1, 1)  # 17 tiles, two groups
    weights[0] = True
    got = BitTactical().conv_cycles(weights, input_hw=(1, 1))
    # the first tile issues 3 rows; an empty one skips two and issues the third
    assert got.cycles == 3 + 1
    assert got.limits["lock-step"] == 3 - ceil_div(3 + 15, 16)


@pytest.mark.parametrize(
    "parameters, expected",
    [
        ((2, 5, "T"), [(1, -1), (1, 0), (1, 1), (1, 3), (2, -2), (2, 0), (2, 2)]),
        ((2, 5, "L"), [(1, -5), (1, -4), (1, -3), (1, -2), (1, -1), (1, 0), (2, 0)]),
        ((1, 5, "T"), [(1, -2), (1, -1), (1, 0), (1, 1), (1, 2), (1, 3)]),
        ((3, 1, "T"), [(1, 0), (1, 1), (2, 0), (3, 0)]),
    ],
)
def test_candidates(parameters, expected) -> None:
    assert [tuple(pair) for pair in candidates(*parameters)] == expected


def test_more_lookahead_never_slows_a_dense_column() -> None:
    mask = np.random.default_rng(0).random((32, 64, 3, 3)) < 0.1
    cycles = [BitTactical(h, 5).conv_cycles(mask, input_hw=(8, 8)).cycles for h in (1, 2, 3, 4)]
    dense = DenseTile().conv_cycles(mask, input_hw=(8, 8)).cycles
    assert cycles == sorted(cycles, reverse=True) and dense / cycles[3] <= 5


def test_scnn_by_hand() -> None:
    # one activation an element, 4 weights: 4 banks, one cycle; 5 weights: a second chunk
    assert SCNN().conv_cycles(ones(4, 1, 1, 1), input_hw=(8, 8)).cycles == 1
    assert SCNN().conv_cycles(ones(5, 3, 1, 1), input_hw=(8, 8)).cycles == 2 * 3
    # 4 x 4 activations an element, in four chunks of one row, no two on a bank
    assert SCNN().conv_cycles(ones(4, 1, 1, 1), input_hw=(32, 32)).cycles == 4
    # every fourth of 8 columns: two activations, which share their banks
    fourth = zeros(1, 8, 64)
    fourth[:, :, ::4] = True
    got = SCNN().conv_cycles(ones(4, 1, 1, 1), fourth, input_hw=(8, 64))
    assert got.cycles == 2 and got.limits["bank conflicts"] == 1
    free = SCNN(conflicts=False).conv_cycles(ones(4, 1, 1, 1), fourth, input_hw=(8, 64))
    assert free.cycles == 1
    # a lost slot still costs a cycle: the weight meets its activation outside the output
    corner = zeros(1, 8, 8)
    corner[0, 0, 0] = True
    last = zeros(1, 1, 3, 3)
    last[0, 0, 2, 2] = True
    got = SCNN().conv_cycles(last, corner, input_hw=(8, 8))
    assert got.multiplications == 0 and got.cycles == 1 + 2 * 2  # halo {2, 1, 0} x {2, 1, 0}


def test_scnn_halo_by_hand() -> None:
    # 8 x 8 with padding 1: 10, extended to 16, 2 an element; {1, 2, 1} x {1, 2, 1}: 2
    got = SCNN().conv_cycles(zeros(5, 2, 3, 3), input_hw=(8, 8), padding=1)
    assert got.cycles == got.limits["halo"] == 5 * 2
    # (top, bottom, left, right): rows 8 + 3, columns 8; {0, 2, 2} x {2, 1, 0}: 4
    got = SCNN().conv_cycles(zeros(1, 1, 3, 3), input_hw=(8, 8), padding=(1, 2, 0, 0))
    assert got.cycles == 2 * 2


def test_scnn_sixteen_hits_on_one_bank() -> None:
    weights, activations = zeros(1, 1, 1, 13), zeros(1, 1, 112)
    weights[..., ::4] = True  # 0, 4, 8, 12
    activations[..., 14:28:4] = True  # of the second element, 14 columns each
    got = SCNN().conv_cycles(weights, activations, input_hw=(1, 112))
    assert got.cycles == 16 + 12 and got.limits["halo"] == 12
    assert got.limits["bank conflicts"] == 15


def test_scnn_filter_groups_by_hand() -> None:
    # 16 x 16 outputs take 4 accumulators an element: 8 hold two filters
    design = SCNN(accumulators=8)
    got = design.conv_cycles(ones(5, 1, 1, 1), input_hw=(16, 16))
    assert got.cycles == 3 and got.own_dense_cycles == 3  # 2, 2 and 1 filter, a chunk each


def test_cambricon_x_by_hand() -> None:
    # 825 inputs: blocks of 256, 256, 256, 57; dense 16 + 16 + 16 + 4 steps; two sets of filters
    got = CambriconX().conv_cycles(ones(*ODD_SHAPE), **ODD)
    assert got.cycles == got.own_dense_cycles == 30 * 2 * 52
    mask = zeros(*ODD_SHAPE)
    mask[3, :17, 0, 0] = True  # 17 of the first block: 2 steps
    mask[16, 32, 4, 4] = True  # the last input: 1 step
    assert CambriconX().conv_cycles(mask, **ODD).cycles == 30 * (2 + 1)


def test_cnvlutin_by_hand() -> None:
    # bricks of 16, 16 and 1 channels on three lanes
    got = Cnvlutin().conv_cycles(ones(257, 33, 1, 1), input_hw=(2, 2))
    assert got.cycles == 2 * 4 * 16 and got.dense_cycles == 2 * 4 * 3
    got = Cnvlutin().conv_cycles(ones(1, 33, 1, 1), zeros(33, 2, 2), input_hw=(2, 2))
    assert got.cycles == 4 and got.own_dense_cycles == 4 * 16
    # 3x3 over 1 channel, padding 1 at 1 x 1: nine bricks, nine lanes, 1 each
    assert Cnvlutin().conv_cycles(ones(1, 1, 3, 3), input_hw=(1, 1), padding=1).cycles == 1


def test_ampere_by_hand() -> None:
    mask = zeros(*ODD_SHAPE)
    mask[:, ::2] = True
    got = Ampere().conv_cycles(mask, **ODD)
    assert got.cycles == 30 * 2 * 25 and got.own_dense_cycles == got.dense_cycles == 30 * 3 * 25
    mask[0, 1, 4, 4] = True  # a third of the first four
    got = Ampere().conv_cycles(mask, **ODD)
    assert got.cycles == 30 * 3 * 25 and "2:4" in got.note
    # two channels have at most two nonzeros in every four
    assert Ampere().conv_cycles(ones(1, 2, 1, 1), input_hw=(1, 1)).cycles == 1


def test_systolic_by_hand() -> None:
    got = Systolic(4, 8, "output-stationary").conv_cycles(ones(*ODD_SHAPE), **ODD)
    assert got.cycles == 8 * 3 * (825 + 4 + 8 - 2) - 1
    got = Systolic(4, 8, "weight").conv_cycles(ones(*ODD_SHAPE), **ODD)
    assert got.cycles == 207 * 3 * (30 + 8 + 8 - 2) - 1 and got.multipliers == 32


def test_tensordash_by_hand() -> None:
    geometry = dict(filters=17, kernel=1, input_hw=(8, 4))  # 32 pixels: two rows of 16
    mask = ones(1, 8, 4)
    got = TensorDash().backward_weight(mask, **geometry)
    assert got.cycles == got.dense_cycles == got.own_dense_cycles == 2 * 2
    mask[:, :4] = False  # the first row is skipped
    assert TensorDash().backward_weight(mask, **geometry).cycles == 1 * 2
    mask[...] = True
    mask[..., 1::2] = False  # even lanes of both rows: one row takes both
    assert TensorDash().backward_weight(mask, **geometry).cycles == 1 * 2
    weights = magnitude_mask(1, 80, (40, 40, 3, 3))
    assert (
        TensorDash().conv_cycles(weights, input_hw=(9, 9)).cycles
        == BitTactical().conv_cycles(weights, input_hw=(9, 9)).cycles
    )


def test_weight_gradients_by_hand() -> None:
    geometry = dict(filters=17, kernel=(5, 5), **ODD)
    mask = ones(33, 11, 9)
    tile = 2 * 3 * 25 * 2  # ceil(30/16) ceil(33/16) 5*5 ceil(17/16)
    for design in (DenseTile(), BitTactical(), Cnvlutin(), Ampere()):
        got = design.backward_weight(mask, **geometry)
        assert got.cycles == got.dense_cycles == got.own_dense_cycles == tile
        assert got.note == "dense: this design cannot skip here"
    got = CambriconX().backward_weight(mask, **geometry)
    assert got.cycles == 825 * 2 * 2 and got.dense_cycles == tile
    got = Systolic(4, 8).backward_weight(mask, **geometry)
    assert got.cycles == ceil_div(825, 4) * 3 * (30 + 10) - 1
    # SCNN, 1x1 on 2 x 2: 4 gradients x 4 filters are 4 chunks; each activation meets one of them,
    # and the four elements with an activation pay for all four chunks; halo {1, 1, 0} x {1, 1, 0}
    got = SCNN().backward_weight(ones(1, 2, 2), filters=4, kernel=1, input_hw=(2, 2))
    assert got.cycles == 4 + 4 * 1 and got.multiplications == 16
    none = SCNN().backward_weight(channels=1, filters=4, kernel=1, input_hw=(2, 2))
    assert none == got


# -- backward as a problem -------------------------------------------------------------------------


def test_input_gradient_by_hand() -> None:
    # 1x1, stride 2 at 4 x 4: 2 x 2 gradients, dilated to 3 x 3, padded to 4 x 4
    got = Ideal(1).backward_input(ones(5, 3, 1, 1), input_hw=(4, 4), stride=2)
    assert got.multiplications == 5 * 3 * 4 == got.own_dense_cycles
    assert got.full_slot_cycles == 5 * 3 * 16
    assert got.dense_cycles == 16
    # strided and 3 channels: the input gradient has stride 1 and is not folded
    got = DenseTile().backward_input(ones(64, 3, 7, 7), input_hw=(14, 14), stride=2, padding=3)
    assert got.cycles == 14 * 14 * 1 * 4 * 49


def test_input_gradient_with_a_mask() -> None:
    gradients = zeros(2, 2, 2)
    gradients[0, 0, 0] = True
    weights = ones(2, 3, 3, 3)
    got = Ideal(1).backward_input(weights, gradients, input_hw=(4, 4), stride=2, padding=1)
    assert got.multiplications == 3 * 4  # the window at (-1, -1) reaches 2 x 2 of the input
    dense = Ideal(1).backward_input(weights, ones(2, 2, 2), input_hw=(4, 4), stride=2, padding=1)
    assert dense == Ideal(1).backward_input(weights, input_hw=(4, 4), stride=2, padding=1)


def test_forward_and_backward_have_the_same_products() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        K, C, R, S, H, W = (int(n) for n in rng.integers(1, 9, 6))
        stride, dilation = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        padding = tuple(int(n) for n in rng.integers(0, 6, 4))
        geometry = dict(input_hw=(H, W), stride=stride, padding=padding, dilation=dilation)
        weights = rng.random((K, C, R, S)) < 0.5
        try:
            forward = Ideal().conv_cycles(weights, **geometry)
        except InputError:
            continue
        backward = Ideal().backward_input(weights, **geometry)
        assert backward.multiplications == forward.multiplications
        gradient = Ideal().backward_weight(filters=K, channels=C, kernel=(R, S), **geometry)
        dense = Ideal().conv_cycles(np.ones_like(weights), **geometry)
        assert gradient.multiplications == dense.multiplications
        SCNN().backward_input(weights, **geometry)


def test_full_slots_of_scnn() -> None:
    # 8 x 8, padding 1: 2 x 2 positions an element, 1 chunk; 9 * 5 weights, 12 chunks; 3 channels
    got = SCNN().backward_input(zeros(3, 5, 3, 3), input_hw=(8, 8), padding=1)
    assert got.full_slot_cycles == 3 * 12 + 5 * 2
    got = SCNN().conv_cycles(ones(5, 3, 3, 3), input_hw=(32, 32), stride=2, padding=1)
    # 34 -> 40: 5 x 5 an element; even elements have 3 even rows, odd ones 2
    # phases (even, even): 9 positions, 20 weights; ...: 6, 10; 6, 10; 4, 5
    assert got.full_slot_cycles == 3 * (3 * 5 + 2 * 3 + 2 * 3 + 1 * 2) + 5 * 5
