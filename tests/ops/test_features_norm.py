"""`swatfx::features_norm`: layer norm with features outermost, against formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swatfx import kernels
from swatfx.compiled.coded import LayerNorm
from swatfx.tensors import layouts
from swatfx.tensors.layouts import FEATURES_MAJOR, IMAGES_INNERMOST

OPS = torch.ops.swatfx
EPS = 1e-5
# Rows about a vector's width, a block's, and those of a short sum.
SHAPES = [
    *[((rows,), features) for rows in (2, 15, 16, 17, 255, 256, 257, 530) for features in (2, 31)],
    *[((3, 5), features) for features in (1, 63, 64, 65, 129, 700)],
    ((4, 3, 2), 33),
    ((2, 1, 1), 5),
    ((1, 4, 4), 5),
]


def inputs(
    rows: tuple[int, ...], features: int, layout: str, dtype: torch.dtype, own: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(*rows, features, generator=generator) * 3 + torch.arange(features) / features
    weight, bias = (torch.randn(features, generator=generator).to(own) for _ in range(2))
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    return layouts.as_layout(x.to(dtype), layout).detach(), weight, bias, grad


@pytest.mark.usefixtures("each_number_of_threads")
@pytest.mark.parametrize("layout", [FEATURES_MAJOR, IMAGES_INNERMOST])
@pytest.mark.parametrize(("rows", "features"), SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "own"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_it_is_the_formula(
    rows: tuple[int, ...], features: int, layout: str, dtype: torch.dtype, own: torch.dtype
) -> None:
    x, weight, bias, grad = inputs(rows, features, layout, dtype, own)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y, mean, rstd = OPS.features_norm(*leaves, EPS)
    found = torch.autograd.grad(y, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = F.layer_norm(wide[0], (features,), *wide[1:], EPS)
    wanted = torch.autograd.grad(true, wide, grad.double())
    kept = layouts.images_behind(wide[0], layouts.elementwise_layout_of(x)).reshape(-1, features)
    torch.testing.assert_close(mean.double(), kept.mean(1), rtol=1e-5, atol=1e-5)
    if features > 1:  # of one, it is the rounding of nothing
        scale = (kept.var(1, correction=0) + EPS).rsqrt()
        torch.testing.assert_close(rstd.double(), scale, rtol=1e-4, atol=0.0)
    # A rounding of each result, and of a sum's terms in single precision.
    unit = torch.finfo(dtype).eps
    for one, other in zip((y, *found), (true, *wanted), strict=True):
        limit = unit if one.dtype is dtype else 2**-20
        error = (one.double() - other).abs().max()
        assert error <= 2 * limit * other.abs().max() + 3e-5 * (1 + float(rstd.max().detach()))
    for made in (y, found[0]):  # where a size is 1, a stride means nothing
        assert layouts.as_layout(made, layout).data_ptr() == made.data_ptr()
    assert [g.dtype for g in found] == [dtype, own, own]


@pytest.mark.parametrize("layout", [FEATURES_MAJOR, IMAGES_INNERMOST])
@pytest.mark.parametrize("only", range(3))
def test_what_is_not_wanted_is_not_made(layout: str, only: int) -> None:
    wants = [i == only for i in range(3)]
    x, *parameters, grad = inputs((4, 9), 20, layout, torch.float32, torch.float32)
    leaves = [t.clone().requires_grad_(w) for t, w in zip((x, *parameters), wants, strict=True)]
    y = OPS.features_norm(*leaves, EPS)[0]
    (found,) = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    true = F.layer_norm(wide[0], (20,), *wide[1:], EPS)
    (wanted,) = torch.autograd.grad(true, [t for t in wide if t.requires_grad], grad.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False], ids=["c", "reference"])
@pytest.mark.parametrize("missing", [(), (1,), (0, 1)], ids=["all", "no bias", "no parameters"])
def test_parameters_may_be_missing(fast: bool, missing: tuple[int, ...]) -> None:
    x, *given, grad = inputs((2, 20), 12, IMAGES_INNERMOST, torch.float32, torch.float32)
    parameters = [None if i in missing else p.requires_grad_() for i, p in enumerate(given)]
    x.requires_grad_()
    used = [x, *(p for p in parameters if p is not None)]
    if fast:
        y = OPS.features_norm(x, *parameters, EPS)[0]
        found = torch.autograd.grad(y, used, grad)
    else:
        with kernels.reference_only():
            y = OPS.features_norm(x, *parameters, EPS)[0]
            found = torch.autograd.grad(y, used, grad)
    true = F.layer_norm(x, (12,), *parameters, EPS)
    torch.testing.assert_close(y, true, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(true, used, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_large_mean_cancels_nothing() -> None:
    """The variance is summed about the mean: 10,000 with a spread of 1 loses no digit of it."""
    x = layouts.as_layout(torch.randn(64, 500).add_(1e4), FEATURES_MAJOR)
    y = OPS.features_norm(x, None, None, EPS)[0]
    true = F.layer_norm(x.double(), (500,), eps=EPS)
    assert (y.double() - true).abs().max() < 3e-3  # an element's own rounding is 1e-3


@pytest.mark.parametrize("features", [3, 33, 96, 700])
@pytest.mark.parametrize("value", [1e4, -3.7e6, 1e-3, 0.1])
def test_rows_of_equal_values_are_normalised_to_nothing(value: float, features: int) -> None:
    """However large they are: the mean is theirs to the last digit."""
    x = layouts.as_layout(torch.full((40, features), value), FEATURES_MAJOR)
    y, mean, rstd = OPS.features_norm(x, None, None, EPS)
    assert not y.any() and torch.equal(mean, x[:, 0])
    torch.testing.assert_close(rstd, torch.full((40,), EPS**-0.5))


@pytest.mark.parametrize("fast", [True, False], ids=["c", "reference"])
@pytest.mark.parametrize("parameters", [True, False])
def test_no_rows_no_gradient(parameters: bool, fast: bool) -> None:
    x = layouts.as_layout(torch.empty(0, 4, 12), IMAGES_INNERMOST).requires_grad_()
    given = [torch.ones(12, requires_grad=True) if parameters else None for _ in range(2)]
    statistics = (torch.empty(0), torch.empty(0))
    wants = [True, parameters, parameters]
    grad = torch.empty(0, 4, 12)
    if fast:
        found = OPS.features_norm_backward(grad, x, *statistics, given[0], wants)
    else:
        with kernels.reference_only():
            found = OPS.features_norm_backward(grad, x, *statistics, given[0], wants)
    assert found[0].shape == x.shape
    assert [g.tolist() for g in found[1:]] == [[0.0] * 12 if parameters else []] * 2


def test_inf_and_nan_stay_in_their_rows() -> None:
    x = layouts.as_layout(torch.randn(40, 7), FEATURES_MAJOR)
    x[3, 2], x[17, 5] = torch.inf, torch.nan
    y = OPS.features_norm(x, None, None, EPS)[0]
    lost = ~y.isfinite().all(1)
    assert lost.nonzero().flatten().tolist() == [3, 17]
    torch.testing.assert_close(y[~lost], F.layer_norm(x[~lost], (7,)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", [FEATURES_MAJOR, IMAGES_INNERMOST])
@pytest.mark.parametrize("rows", [(20,), (4, 5), (2, 3, 3)], ids=str)
def test_opcheck(rows: tuple[int, ...], layout: str) -> None:
    x, weight, bias, _ = inputs(rows, 6, layout, torch.float32, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(OPS.features_norm, (*leaves, EPS))


def test_the_leaf_takes_what_lies_so_and_else_does_as_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaf = LayerNorm("exact")
    x, weight, bias, _ = inputs((4, 9, 3), 20, IMAGES_INNERMOST, torch.float32, torch.float32)
    made = leaf(x, (20,), weight, bias, EPS)
    assert made.stride() == x.stride() and not made.is_contiguous()
    torch.testing.assert_close(made, F.layer_norm(x, (20,), weight, bias, EPS))

    def plain(*args: object) -> Tensor:
        raise AssertionError("was to be left to eager")

    monkeypatch.setattr(torch.ops.swatfx, "features_norm", plain)
    for other in (x.contiguous(), x.double(), x.transpose(1, 2)[:, ::2], x.half()):
        one = None if other.dtype != x.dtype else weight
        expected = F.layer_norm(other, (20,), one)
        assert torch.equal(leaf(other, (20,), one, None, EPS), expected)
    assert torch.equal(leaf(x, (3, 20), None, None, EPS), F.layer_norm(x, (3, 20)))
    half = layouts.as_layout(x.bfloat16(), IMAGES_INNERMOST)
    made = leaf(half, (20,), None, bias, EPS)  # eager forgives it forward alone
    assert torch.equal(made, F.layer_norm(half, (20,), None, bias, EPS))
    with pytest.raises(RuntimeError, match="scalar type|dtype"):
        leaf(half, (20,), weight, bias.bfloat16(), EPS)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        leaf(x, (19,), None, None, EPS)
    assert isinstance(leaf, nn.Module)


@pytest.mark.parametrize("layout", [FEATURES_MAJOR, IMAGES_INNERMOST])
def test_hooks_may_bring_saved_tensors_back_in_another_order(layout: str) -> None:
    x, *parameters, grad = inputs((4, 9), 20, layout, torch.float32, torch.float32)
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    wanted = torch.autograd.grad(OPS.features_norm(*leaves, EPS)[0], leaves, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        y = OPS.features_norm(*leaves, EPS)[0]
    for one, other in zip(torch.autograd.grad(y, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(one, other)
