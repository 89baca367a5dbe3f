"""What else than norms keeps codes: values are eager's, gradients near, and right in the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx.compiled.coded import Attention, scaled_dot_product_heads
from swatfx.errors import SwatError
from swatfx.ops.coded import RULES
from swatfx.ops.codes import BITS, decode_flat, encode_flat, flat_bytes, line_bytes
from swatfx.tensors import bits, layouts
from swatfx.tensors.layouts import FEATURES_MAJOR, IMAGES_INNERMOST
from tests.nets.saving_ops import saved_by

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"  # opcheck's own
)
OPS = torch.ops.swatfx
LAYOUTS = (layouts.ROW_MAJOR, layouts.CHANNELS_LAST, layouts.BATCH_INNERMOST)
SHAPE = (4, 6, 5, 7)
# Largest error of a gradient, over its norm.
NEAR = {"int8": 0.02, "int4": 0.35}
ELEMENTWISE = [name for name, rule in RULES.items() if rule.derivative is not None]


def leaf(shape: tuple[int, ...], layout: str = layouts.ROW_MAJOR, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (layouts.as_layout(x, layout) if x.dim() > 2 else x).detach().requires_grad_()


def check(
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    near: float,
) -> None:
    """Values bit for bit, gradients to within `near`, and all where eager has them in memory."""
    y, wanted = ours(*inputs), eager(*inputs)
    assert torch.equal(y, wanted) and y.stride() == wanted.stride() and y.dtype == wanted.dtype
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    pairs = (torch.autograd.grad(out, inputs, grad) for out in (y, wanted))
    for found, exact in zip(*pairs, strict=True):
        assert found.shape == exact.shape and found.dtype == exact.dtype
        assert float((found - exact).norm() / exact.norm()) < near


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saves", BITS)
@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_functions_of_an_element(rule: str, saves: str, layout: str) -> None:
    x, known = leaf(SHAPE, layout), RULES[rule]
    check(
        lambda x: OPS.elementwise(x, rule, saves)[0],
        lambda x: known.functions[0](x, **known.options),
        (x,),
        NEAR[saves],
    )
    torch.library.opcheck(OPS.elementwise, (x, rule, saves))
    kept = saved_by(lambda: OPS.elementwise(x, rule, saves))
    assert [t.numel() for t in kept] == [flat_bytes(x.numel(), saves)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saves", BITS)
def test_products(saves: str, layout: str) -> None:
    x, other = leaf(SHAPE, layout), leaf(SHAPE, layout, 1)

    def ours(a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = OPS.multiply(a, b, saves, [True, True])[0]
        return y

    for a, b in ((x, leaf((4, 6, 1, 1))), (leaf((6, 1, 1)), x), (x, other), (leaf(()), x)):
        check(
            lambda a, b: OPS.multiply(a, b, saves, [True, True])[0], torch.mul, (a, b), NEAR[saves]
        )
        torch.library.opcheck(OPS.multiply, (a, b, saves, [True, True]))
    kept = saved_by(lambda: OPS.multiply(x, leaf((4, 6, 1, 1)), saves, [True, True]))
    assert sum(t.numel() for t in kept) == line_bytes(x.numel(), saves) + 24
    kept = saved_by(lambda: OPS.multiply(x, leaf((4, 6, 1, 1)).detach(), saves, [True, False]))
    assert sum(t.numel() for t in kept) == 24


@pytest.mark.parametrize("saves", BITS)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms(affine: bool, saves: str) -> None:
    width = (64,)
    parameters = (leaf(width, seed=1), leaf(width, seed=2)) if affine else ()

    def ours(x: Tensor, *given: Tensor) -> Tensor:
        y: Tensor = OPS.layer_norm(x, *(given or (None, None)), width, 1e-5, saves)[0]
        return y

    for shape in ((9, 5, 64), (3, 64)):
        x = leaf(shape)
        check(ours, lambda x, *p: F.layer_norm(x, width, *p), (x, *parameters), NEAR[saves])
        given = parameters or (None, None)
        torch.library.opcheck(OPS.layer_norm, (x, *given, width, 1e-5, saves))


@pytest.mark.parametrize("saves", BITS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [FEATURES_MAJOR, IMAGES_INNERMOST])
@pytest.mark.parametrize("rows", [(64,), (3, 5), (16, 4, 4), (2, 1, 7)], ids=str)
def test_layer_norms_with_features_outermost_go_on_so(
    rows: tuple[int, ...], layout: str, dtype: torch.dtype, affine: bool, saves: str
) -> None:
    """Parameters are float32 as under autocast; codes and gradients lie as their input does."""
    width, shape = (33,), (*rows, 33)
    x = layouts.as_layout(leaf(shape).detach().to(dtype), layout).requires_grad_()
    parameters = [leaf(width, seed=1), leaf(width, seed=2)] if affine else []
    used = [x, *parameters]
    y = OPS.layer_norm(x, *(parameters or (None, None)), width, 1e-5, saves)[0]
    grad = leaf(shape, seed=3).detach().to(dtype)
    found = torch.autograd.grad(y, used, grad)
    wide = [t.detach().double().requires_grad_() for t in used]
    true = F.layer_norm(wide[0], width, *wide[1:])
    wanted = torch.autograd.grad(true, wide, grad.double())
    assert (y - true).norm() <= (1e-5 if dtype is torch.float32 else 0.01) * true.norm()
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= (NEAR[saves] + 0.01) * other.norm()
    for made in (y, found[0]):
        assert layouts.as_layout(made, layout).data_ptr() == made.data_ptr()
    kept = saved_by(lambda: OPS.layer_norm(x, *(parameters or (None, None)), width, 1e-5, saves))
    count = torch.Size(rows).numel()
    assert [t.numel() for t in kept][:2] == [count, flat_bytes(x.numel(), saves)]
    torch.library.opcheck(OPS.layer_norm, (x, *(parameters or (None, None)), width, 1e-5, saves))


@pytest.mark.parametrize("saves", ["exact", *BITS])
@pytest.mark.parametrize("form", ["fused", "biased", "masked"])
def test_attention(form: str, saves: str) -> None:
    q, k, v = (leaf((4, 3, 9, 8), seed=seed) for seed in range(3))
    bias = leaf((1, 3, 9, 9), seed=3)
    mask = torch.zeros(2, 9, 9).masked_fill_(torch.rand(2, 9, 9) < 0.3, -100.0)

    def eager(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        if form == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        scores = (q * 8**-0.5).matmul(k.transpose(-2, -1)) + rest[0]
        if form == "masked":
            scores = scores.view(2, 2, 3, 9, 9) + mask.unsqueeze(1).unsqueeze(0)
        return F.softmax(scores.view(4, 3, 9, 9), dim=-1).matmul(v)

    inputs = (q, k, v) if form == "fused" else (q, k, v, bias)
    args = (None if form == "fused" else bias, mask if form == "masked" else None, saves)
    near = {"exact": 1e-6, "int8": 0.03, "int4": 0.6}[saves]
    check(lambda *given: OPS.attention(*given[:3], *args)[0], eager, inputs, near)
    torch.library.opcheck(OPS.attention, (q, k, v, *args))
    kept = saved_by(lambda: OPS.attention(q, k, v, *args))
    if form == "fused":
        count = q.numel()
        lines = line_bytes(count, saves) if saves in BITS else 4 * count
        size = 3 * lines
        assert sum(t.untyped_storage().nbytes() for t in kept) == size


@pytest.mark.parametrize("saves", ["exact", *BITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 3, 3, 4), (2, 1, 1, 1, 1), (2, 2, 5, 3, 33), (1, 3, 70, 9, 16), (2, 2, 0, 3, 4)],
)
def test_attention_of_odd_sizes(sizes: tuple[int, ...], dtype: torch.dtype, saves: str) -> None:
    """Codes of one tensor begin behind those of another, whatever their number of bytes."""
    batch, heads, length, source, width = sizes
    q, k, v = (
        leaf((batch, heads, size, width), seed=seed).detach().to(dtype).requires_grad_()
        for seed, size in enumerate((length, source, source))
    )
    y = OPS.attention(q, k, v, None, None, saves)[0]
    grad = torch.ones_like(y)
    found = torch.autograd.grad(y, (q, k, v), grad)
    wanted = F.scaled_dot_product_attention(q, k, v)
    for one, other in zip(
        (y, *found), (wanted, *torch.autograd.grad(wanted, (q, k, v), grad)), strict=True
    ):
        assert one.dtype is dtype and one.shape == other.shape and one.isfinite().all()
        if saves == "exact":
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("saves", BITS)
@pytest.mark.parametrize(
    "sizes", [((9, 33), (9, 33)), ((1,), (1,)), ((3, 5), (5,)), ((0, 3), (0, 3))]
)
def test_products_of_odd_sizes(sizes: tuple[tuple[int, ...], ...], saves: str) -> None:
    a, b = (leaf(size, seed=seed) for seed, size in enumerate(sizes))
    for given in ((a, b), (a, a)):
        y, code = OPS.multiply(*given, saves, [True, True])
        with torch.device("meta"):
            fake = OPS.multiply(*(t.detach().to("meta") for t in given), saves, [True, True])[1]
        assert code.shape == fake.shape
        found = torch.autograd.grad(y.sum(), given)
        wanted = torch.autograd.grad((given[0] * given[1]).sum(), given)
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).norm() <= NEAR[saves] * other.norm()


@pytest.mark.parametrize("saves", BITS)
@pytest.mark.parametrize(
    "kind", ["silu", "gelu", "hardswish", "multiply", "layer_norm", "norm", "attention"]
)
def test_no_second_derivative_is_lost(kind: str, saves: str) -> None:
    """A gradient made of codes looked like a constant: a penalty on it was silently another."""
    x = leaf((4, 6, 5, 8))
    channels = torch.zeros(6), torch.ones(6)
    made = {
        "multiply": lambda: OPS.multiply(x, x, saves, [True, True])[0],
        "layer_norm": lambda: OPS.layer_norm(x, None, None, (8,), 1e-5, saves)[0],
        "norm": lambda: OPS.batch_norm(
            x, None, None, None, *channels, True, 0.1, 1e-5, True, saves
        )[0],
        "attention": lambda: OPS.attention(x, x, x, None, None, saves)[0],
    }
    y = made.get(kind, lambda: OPS.elementwise(x, kind, saves)[0])()
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(SwatError, match="norm_saves"):
        gradient.square().sum().backward()


def test_half_bytes_are_right_in_the_mean() -> None:
    """Of 200 draws, to within five deviations of their mean: what is decoded stands in no product
    with itself. What has a chance of less than 15 in 200 may not have been drawn at all: of a cell
    of the derivative, which is at most 0.25 wide.
    """
    x, scale = leaf(SHAPE), leaf((4, 6, 1, 1))
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))

    def gradients(multiply: Callable[..., Any], gelu: Callable[..., Any]) -> list[Tensor]:
        return [
            *torch.autograd.grad(multiply(x, scale), (x, scale), grad),
            *torch.autograd.grad(gelu(x), (x,), grad),
        ]

    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        found.append(
            gradients(
                lambda a, b: OPS.multiply(a, b, "int4", [True, True])[0],
                lambda a: OPS.elementwise(a, "gelu", "int4")[0],
            )
        )
    for i, exact in enumerate(gradients(torch.mul, F.gelu)):
        drawn = torch.stack([g[i] for g in found]).double()
        rare = 15 / 200 * 0.25 * grad.abs() if i == 2 else 0
        room = 5 * drawn.std(0) / 200**0.5 + rare + 1e-5 * (1 + exact.abs())
        assert bool(((drawn.mean(0) - exact).abs() <= room).all()), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("saves", BITS)
def test_vectors_of_every_length(saves: str, dtype: torch.dtype) -> None:
    """Kernels and plain torch read each other's codes, to a float's rounding."""
    for n in (1, 2, 15, 16, 17, 255, 256, 257, 1000, 5003):
        x = leaf((n,), seed=n).detach().to(dtype)
        codes = [encode_flat(x, saves), encode_flat.reference(x, saves)]
        assert codes[0].shape == codes[1].shape == (flat_bytes(n, saves),)
        for code in codes:
            found = decode_flat(code, n, saves, dtype)
            other = decode_flat.reference(code, n, saves, dtype)
            slack = 2.0**-8 if dtype is torch.bfloat16 else 1e-6
            torch.testing.assert_close(found, other, rtol=2 * slack, atol=1e-6)
            root = x.double().abs().sqrt()
            cell = 2 * root.amax() / (2 ** BITS[saves] - 1)
            room = cell * (2 * root + cell) + 2 * slack * (1 + root * root)
            assert bool(((found.double() - x.double()).abs() <= room).all())


# Scores that are left out, and how the others are made: (mask, causal, scale, dropout).
ATTENTION_FORMS: dict[str, tuple[Callable[[], Tensor] | None, bool, float | None, float]] = {
    "plain": (None, False, None, 0.0),
    "bool": (lambda: torch.arange(18) % 9 < 6 + torch.arange(18) // 9 % 2, False, None, 0.0),
    "rows": (lambda: torch.arange(11).unsqueeze(1) >= torch.arange(9), False, None, 0.0),
    "numbers": (lambda: torch.linspace(-3, 3, 2 * 3 * 11 * 9), False, 0.5, 0.0),
    "causal": (None, True, 0.2, 0.0),
    "dropout": (None, False, None, 0.25),
    "all": (lambda: torch.linspace(-3, 3, 2 * 3 * 11 * 9), False, 0.2, 0.25),
    "causal dropout": (None, True, None, 0.25),
}
_MASKS = {"bool": (2, 1, 1, 9), "rows": (11, 9), "numbers": (2, 3, 11, 9), "all": (2, 3, 11, 9)}


def by_formula(
    inputs: tuple[Tensor, ...], mask: Tensor | None, causal: bool, scale: float, noise: Tensor
) -> Tensor:
    """Attention in float64; `noise`: what dropout multiplied weights by."""
    q, k, v = inputs
    scores = torch.einsum("nhld,nhsd->nhls", q, k) * scale
    if mask is not None:
        unseen = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(mask == 0, -torch.inf)
        scores = scores + (unseen if mask.dtype is torch.bool else mask.double())
    if causal:
        later = torch.arange(k.shape[2]) > torch.arange(q.shape[2]).unsqueeze(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True) * noise
    return torch.einsum("nhls,nhsd->nhld", weights, v)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("saves", ["exact", *BITS])
@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_attention_by_its_formula(form: str, saves: str, half: bool) -> None:
    """Values are eager's, of the same draw; gradients are near those of float64.

    Of operands rounded to bfloat16 where autocast rounds them.
    """
    made, causal, scale, dropout = ATTENTION_FORMS[form]
    inputs = tuple(leaf((2, 3, n, 16), seed=i) for i, n in enumerate((11, 9, 9)))
    mask = None if made is None else made().view(_MASKS[form])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        torch.manual_seed(7)
        y, code, dropped = OPS.attention(*inputs, None, mask, saves, causal, scale, dropout)
        torch.manual_seed(7)
        eager = F.scaled_dot_product_attention(*inputs, mask, dropout, causal, scale=scale)
    assert torch.equal(y, eager) and y.dtype is eager.dtype and y.stride() == eager.stride()
    left = bits.bits_to_mask(dropped, 2 * 3 * 11 * 9) if dropout else torch.ones(2 * 3 * 11 * 9)
    noise = left.view(2, 3, 11, 9).double() / (1 - dropout)
    seen = [x.bfloat16() if half else x for x in (*inputs, *(() if mask is None else (mask,)))]
    if mask is not None and mask.dtype is torch.bool:
        seen[3] = mask
    twins = [x.detach().double().requires_grad_() for x in seen[:3]]
    told = (causal, 16**-0.5 if scale is None else scale)
    wanted = by_formula(tuple(twins), seen[3] if mask is not None else None, *told, noise)
    if dropout:  # what is masked anyway counts as dropped
        assert 0.5 < float(left.view(2, 3, 11, 9).tril().sum() / (6 * 63)) < 0.95
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    found = torch.autograd.grad(y, inputs, grad)
    exact = torch.autograd.grad(wanted, twins, grad.double())
    near = {"exact": 1e-6, "int8": 0.02, "int4": 0.45}[saves] + 0.004 * half
    errors = [float((g - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True)]
    assert max(errors) < near and all(g.dtype is torch.float32 for g in found)
    torch.library.opcheck(OPS.attention, (*inputs, None, mask, saves, causal, scale, dropout))


@pytest.mark.parametrize("saves", ["exact", "int8"])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_without_features_are_eagers(saves: str, masked: bool) -> None:
    leaf = Attention(F.scaled_dot_product_attention, scaled_dot_product_heads, saves)
    three = [torch.randn(1, 2, 5, 0, requires_grad=True) for _ in range(3)]
    y = leaf(*three, torch.randn(1, 2, 5, 5) if masked else None)
    y.sum().backward()
    assert y.shape == (1, 2, 5, 0) and all(x.grad is not None for x in three)
