"""Max pooling, ReLU, dropout and changes of layout in C against the ops that define them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swatfx import kernels
from swatfx.errors import InputError
from swatfx.ops import pool
from swatfx.ops.dropout import dropout_backward_reference, dropout_reference
from swatfx.ops.layout import converted, to_layout, to_layout_reference
from swatfx.ops.relu import relu_backward_reference, relu_reference
from swatfx.tensors import layouts
from tests.nets.kernel_calls import threads

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")

OPS = torch.ops.swatfx
LAYOUTS = ["row_major", "channels_last", "batch_innermost"]
SHAPES = [
    (5, 3, 7, 7),
    (1, 4, 5, 5),
    (16, 8, 6, 6),
    (33, 5, 3, 3),
    (16, 7, 1, 1),
    (6, 1, 9, 9),
    (3, 17, 40, 33),
    (1, 1, 1, 1),
    (4, 6, 31),
    (2, 3, 4, 5, 6),
]


def reference(op: Callable[..., Any], *args: Any) -> Any:
    """What `op`, a reference, gives with no kernel of ours below it."""
    with kernels.reference_only():
        return op(*args)


def draw(shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return layouts.as_layout(torch.randn(shape, generator=generator), layout)


def steps(x: Tensor) -> list[int]:
    """Strides of the dimensions that have any."""
    return [step for step, extent in zip(x.stride(), x.shape, strict=True) if extent != 1]


def assert_same(found: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...]) -> None:
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for a, b in pairs:
        assert a.shape == b.shape and steps(a) == steps(b) and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- Max pooling ---------------------------------------------------------------------------------


def check_pool(x: Tensor, *options: object, saves: bool = True) -> None:
    found = OPS.max_pool2d(x, *options, saves)
    assert_same(found, reference(pool.max_pool2d_reference, x, *options, saves))
    if not saves or not found[0].numel():
        return
    grad = draw(tuple(found[0].shape), layouts.layout_of(x), 5)
    args = (grad, found[1], x.shape, layouts.layout_of(x), *options)
    assert_same(
        OPS.max_pool2d_backward(*args), reference(pool.max_pool2d_backward_reference, *args)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 5, 16, 33])
@pytest.mark.parametrize(
    "options",
    [
        ([3, 3], [2, 2], [1, 1], [1, 1], False),
        ([2, 2], [2, 2], [0, 0], [1, 1], True),
        ([3, 3], [1, 1], [1, 1], [1, 1], False),
        ([3, 2], [3, 1], [1, 0], [1, 2], True),
        ([1, 4], [2, 3], [0, 2], [1, 1], False),
        ([16, 16], [5, 7], [8, 8], [1, 1], False),
        ([2, 2], [3, 4], [0, 0], [2, 3], False),
    ],
    ids=str,
)
def test_max_pool_is_the_reference(
    options: tuple[list[int], list[int], list[int], list[int], bool], batch: int, layout: str
) -> None:
    x = draw((batch, 5, 17, 22), layout, 1)
    x = (x * 2).round() / 2  # ties in most windows
    for count in (1, 2, 3):
        with threads(count):
            check_pool(x, *options)
            check_pool(x, *options, saves=False)


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(5, 14), st.integers(5, 14)),
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 5)] * 2),
    st.tuples(*[st.integers(0, 2)] * 2),
    st.booleans(),
    st.sampled_from(LAYOUTS),
)
def test_max_pool_of_any_shape(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
    layout: str,
) -> None:
    padding = min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2)
    check_pool(draw(shape, layout, 2), kernel, stride, padding, [1, 1], ceil_mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [3, 16])
def test_max_pool_hands_on_nan_and_minus_infinity(batch: int, layout: str) -> None:
    x = draw((batch, 16, 8, 8), layout, 3)
    x[:, 0] = -torch.inf
    x[0, 1, 3, 3] = torch.nan
    x[1, 1, 2:4, 2:4] = torch.nan
    x[0, 2, 0, 0] = torch.inf
    check_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    check_pool(x, [2, 2], [2, 2], [0, 0], [1, 1], False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_gradient_is_eagers(layout: str) -> None:
    x = draw((16, 6, 12, 12), layout, 4).requires_grad_()
    options = ([3, 3], [2, 2], [1, 1])
    y, _ = OPS.max_pool2d(x, *options, [1, 1], False)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(y, x, grad)
    (wanted,) = torch.autograd.grad(F.max_pool2d(x, *options), x, grad)
    assert torch.equal(found, wanted) and found.stride() == x.stride()


def test_max_pool_elsewhere_is_the_reference() -> None:
    options = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    for x in (
        draw((2, 3, 6, 6), "batch_innermost", 1).double(),
        torch.randn(0, 3, 6, 6),
        torch.randn(2, 3, 6, 12)[..., ::2],
    ):
        check_pool(x, *options)


# ---- ReLU and dropout ----------------------------------------------------------------------------


def tensors(layout: str) -> Iterator[Tensor]:
    for i, shape in enumerate(SHAPES):
        yield draw(shape, layout, i)
    yield torch.randn(0, 3, 4, 4)
    yield torch.randn(7)
    yield torch.tensor(-1.0)
    yield torch.randn(4, 6).t()
    yield torch.randn(3, 4, 10)[..., ::2]
    yield torch.randn(9).double()
    yield torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, -1e-45])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_is_the_reference(layout: str, count: int) -> None:
    with threads(count):
        for x in tensors(layout):
            found = OPS.relu(x)
            assert_same(found, reference(relu_reference, x))
            grad = torch.randn(x.shape, dtype=x.dtype)
            for g in (grad, torch.ones((), dtype=x.dtype).expand(x.shape)):
                args = (g, found[1], layouts.layout_of(x))
                assert_same(OPS.relu_backward(*args), reference(relu_backward_reference, *args))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_the_reference(layout: str, count: int) -> None:
    with threads(count):
        for x in tensors(layout):
            for p in (0.1, 0.5, 0.7):
                torch.manual_seed(1)
                found = OPS.dropout(x, p)
                torch.manual_seed(1)
                wanted = reference(dropout_reference, x, p)
                assert_same(found, wanted)
                grad = torch.randn(x.shape, dtype=x.dtype)
                if grad.numel() > 1:
                    grad.view(-1)[0] = torch.inf
                args = (grad, found[1], p, layouts.layout_of(x))
                assert_same(
                    OPS.dropout_backward(*args), reference(dropout_backward_reference, *args)
                )


def test_a_long_tensor_is_cut_between_threads() -> None:
    x = torch.randn(3 * (1 << 15) + 5)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            y, bits = OPS.relu(x)
            results.append((y, bits, OPS.relu_backward(x, bits, "row_major")))
            assert_same((y, bits), reference(relu_reference, x))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_what_outgrows_the_caches_is_written_past_them() -> None:
    # Other store instructions: from 2^22 elements on.
    for layout in ("row_major", "batch_innermost"):
        x = draw((16, 9, 256, 128), layout, 1)
        y, bits = OPS.relu(x)
        assert_same((y, bits), reference(relu_reference, x))
        assert_same(OPS.relu_backward(x, bits, layout), y)
        check_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
        args = (x, y, None, None, None, None, True, 0.1, 1e-5, True, "exact")
        found = OPS.batch_norm(*args)
        wanted = F.relu(F.batch_norm(x, None, None, training=True) + y)
        torch.testing.assert_close(found[0], wanted)
        for other in LAYOUTS:
            assert torch.equal(to_layout(x, other), x)


# ---- Changes of layout ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (20, 35, 9, 9), (3, 6), (0, 3, 4, 4)], ids=str)
def test_copies_between_all_layouts(shape: tuple[int, ...], count: int) -> None:
    with threads(count):
        for before in LAYOUTS:
            for after in LAYOUTS:
                x = draw(shape, before, 1)
                y = to_layout(x, after)
                assert_same(y, reference(to_layout_reference, x, after))
                assert not y._is_view() and (not x.numel() or y.data_ptr() != x.data_ptr())
                assert torch.equal(x, y)
                assert layouts.flat_view(y, after).data_ptr() == y.data_ptr()


def test_odd_strides_and_dtypes_are_copied_too() -> None:
    for x in (torch.randn(3, 4, 5, 6)[:, :, ::2], torch.randn(2, 3, 4, 4).to(torch.bfloat16)):
        for layout in LAYOUTS:
            y = to_layout(x, layout)
            assert torch.equal(x, y) and layouts.as_layout(y, layout).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_goes_back_in_the_layout_of_the_input(layout: str) -> None:
    x = draw((4, 3, 5, 5), layout, 1).requires_grad_()
    for other in LAYOUTS:
        grad = draw((4, 3, 5, 5), other, 2)
        (found,) = torch.autograd.grad(to_layout(x, other), x, grad)
        assert torch.equal(found, grad) and found.stride() == x.stride()


def test_what_lies_so_already_is_not_copied() -> None:
    for layout in LAYOUTS:
        x = draw((4, 3, 5, 5), layout, 1)
        assert converted(x, layout) is x
        for other in LAYOUTS:
            assert layouts.layout_of(converted(x, other)) == other


# opcheck itself looks at .grad of tensors that it has cloned.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_layout_keeps_the_rules_of_ops(layout: str) -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    torch.library.opcheck(to_layout, (x, layout))


@pytest.mark.parametrize("stride", [300, 2**17, 2**26, 2**62])
@pytest.mark.parametrize("axis", [0, 1])
def test_strides_beyond_the_image(stride: int, axis: int) -> None:
    """As eager does it: at once, or refused."""
    x = torch.randn(32, 2, 6, 7)
    steps = [2, 2]
    steps[axis] = stride
    options = ([3, 3], steps, [1, 1], [1, 1])
    if stride == 2**62:
        with pytest.raises(RuntimeError, match="overflow"):
            OPS.max_pool2d(x, *options, True)
        return
    for layout in ("row_major", "batch_innermost"):
        y, _ = OPS.max_pool2d(layouts.as_layout(x, layout).requires_grad_(), *options, False)
        assert torch.equal(y, F.max_pool2d(x, *options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_pools_gradient_of_another_shape_is_refused(layout: str) -> None:
    for shape in ((64, 16, 3, 3), (2, 16, 4, 3), (2, 17, 3, 3)):
        with pytest.raises(InputError, match="another shape than the pool's output"):
            OPS.avg_pool2d_backward(
                torch.randn(shape), [2, 16, 6, 7], layout, [2, 2], [2, 2], [0, 0], False, True, None
            )
