"""Structured sparse convolutions: patterns by their definition, and the supplement's rows.

The supplement of the paper (Verma et al.) gives settings of (g, p) and the percentage of the
original network's parameters that remain. What comes out here is written beside each.
"""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swatfx import models
from swatfx.density import DENSE
from swatfx.errors import PolicyError, UnknownNameError
from swatfx.selectors.ssc import SscSelector
from swatfx.selectors.ssc_pattern import TAPS, ssc_density, ssc_kept, ssc_mask

SETTINGS = settings(deadline=None, max_examples=80)
odd = st.sampled_from([1, 3, 5])
shapes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 20), st.integers(1, 20), odd),
    st.tuples(st.integers(1, 20), st.integers(1, 20), odd, odd),
    st.tuples(st.integers(1, 6), st.integers(1, 6), odd, odd, odd),
)
periods = st.integers(1, 25)
patterns = st.sampled_from(sorted(TAPS))
Shape = tuple[int, ...]

PLUS = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
CROSS = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
CENTRE = [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
NOTHING = [[0, 0, 0], [0, 0, 0], [0, 0, 0]]


def by_definition(shape: Shape, g: int, p: int, taps: str, shift: int) -> Tensor:
    """The mask, weight by weight."""
    filters, channels, *kernel = shape
    g, p = min(g, channels), min(p, channels)
    keep = torch.zeros(shape, dtype=torch.bool)
    for n, m in itertools.product(range(filters), range(channels)):
        for at in itertools.product(*(range(size) for size in kernel)):
            away = [abs(i - size // 2) for i, size in zip(at, kernel, strict=True) if size > 1]
            if taps == "plus":
                in_slice = len([a for a in away if a]) < 2
            else:
                in_slice = all(a == b for a, b in itertools.pairwise(away))
            slices = math.prod(kernel) > 1 and in_slice and (m - shift * n) % g == 0
            keep[(n, m, *at)] = slices or (not any(away) and (m - shift * n) % p == 0)
    return keep


@pytest.mark.parametrize(("taps", "slices"), [("plus", PLUS), ("x", CROSS)])
def test_a_3x3_layer_by_hand(taps: str, slices: list[list[int]]) -> None:
    # g = 2: filters 0 and 2 read channels 0 and 2; p = 3: filters 0, 1, 2 begin at 0, 1, 2.
    expected = [
        [slices, NOTHING, slices, CENTRE],
        [NOTHING, slices, NOTHING, slices],
        [slices, NOTHING, slices, NOTHING],
    ]
    mask = ssc_mask((3, 4, 3, 3), 2, 3, taps=taps)
    assert torch.equal(mask, torch.tensor(expected, dtype=torch.bool))
    # Slices 5 * (2 + 2 + 2); single taps 2 + 1 + 1, of which one stands outside a slice.
    assert ssc_kept((3, 4, 3, 3), 2, 3, taps=taps)[1:] == (Fraction(34, 108), Fraction(31, 108))


def test_1x1_and_linear_layers_have_the_single_tap_only() -> None:
    rows = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [1, 0, 0, 1, 0]])
    for ones in ((), (1,), (1, 1), (1, 1, 1)):
        mask = ssc_mask((4, 5, *ones), 2, 3)
        assert torch.equal(mask, rows.bool().view(4, 5, *ones))
        kept = ssc_kept((4, 5, *ones), 2, 3)
        assert kept == (Fraction(1, 3), Fraction(7, 20), Fraction(7, 20))


@pytest.mark.parametrize(
    ("kernel", "plus", "cross"),
    [((3,), 3, 3), ((5,), 5, 5), ((5, 5), 9, 9), ((7, 7), 13, 13), ((1, 7), 7, 7), ((3, 5), 7, 5),
     ((3, 3, 3), 7, 9), ((1, 3, 3), 5, 5)],
)  # fmt: skip
def test_taps_of_other_kernels(kernel: Shape, plus: int, cross: int) -> None:
    for taps, count in (("plus", plus), ("x", cross)):
        assert int(ssc_mask((1, 1, *kernel), 1, 1, taps=taps).sum()) == count
        expected = Fraction(count, 4 * math.prod(kernel)) + Fraction(1, 8 * math.prod(kernel))
        assert ssc_kept((8, 8, *kernel), 4, 8, taps=taps).formula == expected


def test_shift() -> None:
    still = ssc_mask((6, 6, 3, 3), 3, 2, shift=0)
    assert torch.equal(still, still[:1].expand_as(still)) and not still[:, 1].any()
    twice = ssc_mask((3, 8, 3, 3), 4, 4, shift=2)
    first = [torch.nonzero(row)[0].item() for row in twice.sum((2, 3))]
    assert first == [0, 2, 0]


@SETTINGS
@given(shape=shapes, g=periods, p=periods, taps=patterns, shift=st.integers(0, 3))
def test_masks_are_what_is_defined_and_counted(
    shape: Shape, g: int, p: int, taps: str, shift: int
) -> None:
    mask = ssc_mask(shape, g, p, taps=taps, shift=shift)
    assert torch.equal(mask, by_definition(shape, g, p, taps, shift))
    kept = ssc_kept(shape, g, p, taps=taps, shift=shift)
    assert kept.union * mask.numel() == int(mask.sum())
    assert kept.union <= kept.summed
    assert mask.flatten(1).any(1).all()  # every filter reads something
    if shift == 1 and shape[0] >= min(p, shape[1]):
        assert mask.transpose(0, 1).flatten(1).any(1).all()  # and every channel is read


@SETTINGS
@given(
    filters=st.integers(1, 70),
    g=st.integers(1, 8),
    p=st.integers(1, 8),
    times=st.integers(1, 3),
    taps=patterns,
)
def test_count_is_the_papers_where_g_and_p_divide_the_channels(
    filters: int, g: int, p: int, times: int, taps: str
) -> None:
    channels = math.lcm(g, p) * times
    kept = ssc_kept((filters, channels, 3, 3), g, p, taps=taps)
    assert kept.formula == kept.summed == Fraction(5, 9 * g) + Fraction(1, 9 * p)
    assert kept.summed - kept.union == Fraction(1, 9 * math.lcm(g, p))
    assert ssc_kept((filters, channels), g, p) == (Fraction(1, p),) * 3


def test_density_is_exact_and_counts_as_asked() -> None:
    shape = (16, 16, 3, 3)
    assert ssc_density(shape, 4, 8).exact == Fraction(11, 72)
    assert ssc_density(shape, 4, 8).value == 11 / 72
    assert ssc_density(shape, 4, 8, overlap="union").exact == Fraction(10, 72)
    assert ssc_density((16, 16, 3), 1, 1) == DENSE  # the slice is the whole kernel
    assert ssc_density((16, 1, 3, 3), 4, 8).exact == Fraction(6, 9)  # depthwise: nothing to choose


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PolicyError, match="centre tap.*'3x2'.*per_layer"):
        ssc_mask((8, 8, 3, 2), 2, 2)
    with pytest.raises(PolicyError, match="centre tap"):
        ssc_kept((8, 8, 4), 2, 2)
    for bad in ({"g": 0, "p": 2}, {"g": 2, "p": -1}, {"g": 2, "p": 1.5}, {"g": True, "p": 1}):
        with pytest.raises(PolicyError, match="whole number"):
            ssc_mask((8, 8, 3, 3), **bad)
    with pytest.raises(PolicyError, match="shift"):
        ssc_kept((8, 8, 3, 3), 2, 2, shift=-1)
    with pytest.raises(UnknownNameError, match="plus"):
        ssc_mask((8, 8, 3, 3), 2, 2, taps="pluss")
    with pytest.raises(UnknownNameError, match="union"):
        ssc_density((8, 8, 3, 3), 2, 2, overlap="unoin")


def test_g_and_p_of_1_keep_the_five_taps_and_all_of_a_1x1() -> None:
    assert torch.equal(ssc_mask((2, 3, 3, 3), 1, 1), torch.tensor(PLUS).bool().expand(2, 3, 3, 3))
    assert ssc_mask((2, 3, 1, 1), 1, 1).all()


def test_grouped_convolutions_number_channels_within_the_group() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    mask = ssc_mask(layer.weight.shape, 4, 4)
    assert mask.shape == (8, 4, 3, 3)
    assert torch.equal(mask[:4], mask[4:])
    assert [int(row.nonzero()) for row in mask.any(-1).any(-1)] == [0, 1, 2, 3] * 2


# The supplement's rows --------------------------------------------------------------------------


@functools.cache
def network(name: str, classes: int) -> tuple[list[Shape], int]:
    """(weight shapes of the layers in order, number of all parameters)."""
    with torch.device("meta"):
        if name == "vgg19":  # as the supplement describes it, with one linear layer
            widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
            layers: list[nn.Module] = []
            for inputs, width in zip([3, *widths], widths, strict=False):
                layers += [nn.Conv2d(inputs, width, 3, bias=False), nn.BatchNorm2d(width)]
            model: nn.Module = nn.Sequential(*layers, nn.Linear(512, classes))
        else:
            model = models.create(name, num_classes=classes)
    kinds = (nn.Conv2d, nn.Linear)
    found = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, kinds)]
    return found, sum(parameter.numel() for parameter in model.parameters())


def setting(filters: list[int], g: list[int], p: list[int]) -> SscSelector:
    """The selector of a row: g and p by number of filters."""
    g_text, p_text = ("/".join(map("{}={}".format, filters, x)) for x in (g, p))
    return SscSelector.parse(f"ssc:g{g_text}:p{p_text}")


def remaining(
    selector: SscSelector, name: str, classes: int, counted: str = "formula", others: bool = True
) -> float:
    """Percentage of the parameters that remain; first and last layer are dense.

    `others`: biases and batch norm count too, as they are.
    """
    layers, parameters = network(name, classes)
    sizes = [math.prod(shape) for shape in layers]
    kept = Fraction(sizes[0] + sizes[-1])
    for shape, elements in zip(layers[1:-1], sizes[1:-1], strict=True):
        found = selector.periods(shape)
        share = Fraction(1) if found is None else getattr(ssc_kept(shape, *found), counted)
        kept += elements * share
    rest = parameters - sum(sizes) if others else 0
    return float(100 * (kept + rest) / (sum(sizes) + rest))


RESNET32 = [32, 64, 128]
VGG19 = [64, 128, 256, 512]
# network, classes, g, p, the paper's percentage, what comes out
ROWS = [
    # table 3: six settings said to remain the same 10%
    ("cifar/resnet32x2", 100, [1, 6, 16], [2, 6, 6], 10, 10.16),
    ("cifar/resnet32x2", 100, [2, 6, 15], [2, 3, 4], 10, 10.06),
    ("cifar/resnet32x2", 100, [2, 4, 16], [2, 4, 5], 10, 10.13),
    ("cifar/resnet32x2", 100, [1, 4, 15], [2, 16, 16], 10, 10.06),
    ("cifar/resnet32x2", 100, [2, 4, 19], [2, 4, 4], 10, 10.16),
    ("cifar/resnet32x2", 100, [4, 8, 8], [4, 8, 9], 10, 9.56),
    # tables 1 and 2, without their first rows
    ("cifar/resnet32x2", 10, [2, 8, 32], [2, 8, 64], 5, 5.06),
    ("cifar/resnet32x2", 10, [8, 32, 64], [16, 32, 64], 2, 1.95),
    ("cifar/resnet32x2", 100, [2, 16, 32], [2, 6, 64], 5, 5.09),
    ("cifar/resnet32x2", 100, [16, 64, 64], [16, 32, 64], 2, 2.22),
    # section 1.3
    ("cifar/resnet32x2", 200, [1, 2, 11], [1, 4, 10], 15, 15.26),
    ("cifar/resnet32x2", 200, [2, 4, 16], [2, 4, 8], 10, 10.10),
    ("cifar/resnet32x2", 200, [2, 10, 64], [2, 16, 32], 5, 5.39),
    ("vgg19", 200, [1, 1, 2, 10], [1, 2, 2, 15], 10, 10.32),
    ("vgg19", 200, [1, 1, 3, 35], [1, 2, 4, 35], 5, 5.22),
    ("vgg19", 200, [1, 4, 8, 64], [1, 4, 12, 40], 2, 2.69),
    # sections 1.1 and 1.2; in these rows of VGG-19, too, "q" is read as g
    ("vgg19", 10, [1, 2, 4, 16], [1, 2, 2, 2], 10, 10.56),
    ("vgg19", 10, [1, 1, 4, 16], [1, 2, 4, 16], 5, 6.28),
    ("vgg19", 10, [1, 4, 8, 64], [1, 4, 8, 25], 2, 2.41),
    ("vgg19", 100, [1, 1, 2, 10], [1, 2, 2, 15], 10, 10.09),
    ("vgg19", 100, [1, 1, 3, 30], [1, 2, 4, 30], 5, 5.26),
    ("vgg19", 100, [1, 4, 8, 64], [1, 4, 8, 25], 2, 2.64),
]
FAR = ("vgg19", 10, 5)  # the one row that is off by more than 0.7 points: by 1.3


@pytest.mark.parametrize(("name", "classes", "g", "p", "paper", "out"), ROWS)
def test_rows_of_the_supplement(
    name: str, classes: int, g: list[int], p: list[int], paper: int, out: float
) -> None:
    selector = setting(VGG19 if name == "vgg19" else RESNET32, g, p)
    percent = remaining(selector, name, classes)
    assert percent == pytest.approx(out, abs=0.006)
    near = 0.7 if name == "vgg19" else 0.6
    assert abs(percent - paper) < (1.3 if (name, classes, paper) == FAR else near)
    # Channels that g or p does not divide move the count as constructed by little; the mask, which
    # keeps the tap of both kernels once, has less.
    summed = remaining(selector, name, classes, "summed")
    assert summed == pytest.approx(percent, abs=0.06)
    assert remaining(selector, name, classes, "union") < summed


@pytest.mark.parametrize(
    ("classes", "p", "g", "as_written", "swapped"),
    [(10, [2, 4, 15], [2, 4, 4], 16.24, 10.19), (100, [2, 4, 16], [2, 4, 4], 16.72, 10.57)],
)
def test_first_rows_of_tables_1_and_2_fit_10_percent_only_swapped(
    classes: int, p: list[int], g: list[int], as_written: float, swapped: float
) -> None:
    written = remaining(setting(RESNET32, g, p), "cifar/resnet32x2", classes)
    assert written == pytest.approx(as_written, abs=0.006) and abs(written - 10) > 6
    other = remaining(setting(RESNET32, p, g), "cifar/resnet32x2", classes)
    assert other == pytest.approx(swapped, abs=0.006) and abs(other - 10) < 0.6


@pytest.mark.parametrize(
    ("p", "q", "paper", "of_weights", "of_parameters"),
    [
        ([1, 2, 2, 2], [1, 1, 2, 2, 2, 2], 40, 40.24, 40.36),
        ([1, 2, 4, 8], [1, 1, 4, 4, 8, 8], 20, 23.47, 23.63),  # 3.5 points from what is printed
    ],
)
def test_resnet50_of_section_1_4(
    p: list[int], q: list[int], paper: int, of_weights: float, of_parameters: float
) -> None:
    p_text = "/".join(map("{}={}".format, VGG19, p))
    q_text = "/".join(map("{}={}".format, [*VGG19, 1024, 2048], q))
    selector = SscSelector.parse(f"ssc:g64=1/128=1/256=4/512=8:p{p_text}:q{q_text}")
    found = remaining(selector, "resnet50", 1000, others=False)
    assert found == pytest.approx(of_weights, abs=0.006)
    assert remaining(selector, "resnet50", 1000) == pytest.approx(of_parameters, abs=0.006)
    assert abs(found - paper) < (0.6 if paper == 40 else 3.6)
