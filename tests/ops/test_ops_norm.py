"""`swatfx::batch_norm`: eager's values and gradients bit for bit, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swatfx.ops import norm
from swatfx.ops.codes import BITS, decode
from swatfx.tensors import layouts
from tests.nets.saving_ops import leaf, saved_by

# Compiled kernels are compared with the references elsewhere.
pytestmark = pytest.mark.usefixtures("reference_kernels")
torch.set_num_threads(1)
OPS = torch.ops.swatfx


# ---- Batch norm ----------------------------------------------------------------------------------


class Case:
    """Arguments of one batch norm; `grad` of which tensors is wanted."""

    def __init__(self, shape: tuple[int, ...], layout: str = "row_major", **options: Any) -> None:
        self.shape, self.layout, self.options = shape, layout, options
        self.dtype = options.get("dtype", torch.float32)
        self.training = options.get("training", True)
        self.relu = options.get("relu", False)
        self.eps, self.momentum = 1e-5, options.get("momentum", 0.1)

    def tensors(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(3)
        channels = self.shape[1]
        params = self.options.get("params", self.dtype)
        dtype = {"generator": generator, "dtype": torch.float64}

        def vector(**kind: Any) -> Tensor:
            return torch.randn(channels, **dtype).to(params)

        t: dict[str, Tensor | None] = {
            "x": leaf(self.shape, self.layout, dtype=self.dtype),
            "residual": None,
            "weight": vector().requires_grad_(),
            "bias": vector().requires_grad_(),
            "running_mean": vector(),
            "running_var": vector().abs() + 0.5,
        }
        if self.options.get("residual"):
            other = torch.randn(self.shape, **dtype).to(self.dtype)
            t["residual"] = layouts.as_layout(other, self.layout).detach().requires_grad_()
        if not self.options.get("affine", True):
            t["weight"] = t["bias"] = None
        if not self.options.get("track", True):
            t["running_mean"] = t["running_var"] = None
        for name in self.options.get("frozen", ()):
            value = t[name]
            assert value is not None
            value.requires_grad_(False)
        return t

    def eager(self, t: dict[str, Tensor | None]) -> Tensor:
        """As a model does it; writes the running statistics."""
        y = F.batch_norm(
            t["x"],
            t["running_mean"],
            t["running_var"],
            t["weight"],
            t["bias"],
            self.training,
            self.momentum,
            self.eps,
        )
        y = y if t["residual"] is None else y + t["residual"]
        return F.relu(y) if self.relu else y

    def args(self, t: dict[str, Tensor | None], saves: str = "exact") -> tuple[Any, ...]:
        return (*t.values(), self.training, self.momentum, self.eps, self.relu, saves)


CASES = {
    "2d": Case((4, 6, 5, 7)),
    "2d_relu": Case((4, 6, 5, 7), relu=True),
    "2d_residual": Case((4, 6, 5, 7), relu=True, residual=True),
    "residual_alone": Case((4, 6, 5, 7), residual=True),
    "large": Case((16, 64, 14, 14), relu=True),
    "last": Case((4, 16, 5, 7), "channels_last", relu=True),
    "last_residual": Case((4, 16, 5, 7), "channels_last", relu=True, residual=True),
    "innermost": Case((4, 6, 5, 7), "batch_innermost", relu=True),
    "innermost_residual": Case((4, 6, 5, 7), "batch_innermost", relu=True, residual=True),
    "rows": Case((9, 6), relu=True),
    "1d": Case((4, 6, 7), relu=True),
    "1d_innermost": Case((4, 6, 7), "batch_innermost", relu=True),
    "3d": Case((2, 3, 4, 5, 6), relu=True, residual=True),
    "3d_last": Case((2, 3, 4, 5, 6), "channels_last", relu=True),
    "plain_affine": Case((4, 6, 5, 7), affine=False, relu=True),
    "untracked": Case((4, 6, 5, 7), track=False, relu=True),
    "cumulative": Case((4, 6, 5, 7), momentum=0.3, relu=True),
    "frozen": Case((4, 6, 5, 7), training=False, relu=True),
    "frozen_last": Case((4, 16, 5, 7), "channels_last", training=False, relu=True),
    "frozen_residual": Case((4, 6, 5, 7), training=False, relu=True, residual=True),
    "frozen_bare": Case((4, 6, 5, 7), training=False),
    "frozen_plain": Case((4, 6, 5, 7), training=False, affine=False, relu=True),
    "frozen_weight": Case((4, 6, 5, 7), training=False, relu=True, frozen=("weight", "bias")),
    "double": Case((4, 6, 5, 7), dtype=torch.float64, relu=True),
    "bfloat16": Case((4, 6, 5, 7), dtype=torch.bfloat16, params=torch.float32, relu=True),
    "half": Case((4, 6, 5, 7), dtype=torch.float16, params=torch.float32, relu=True, residual=True),
    "pure_bfloat16": Case((4, 6, 5, 7), dtype=torch.bfloat16, relu=True),
    "frozen_bfloat16": Case((4, 6, 5, 7), dtype=torch.bfloat16, training=False, relu=True),
    "frozen_pure": Case((4, 6, 5, 7), dtype=torch.bfloat16, training=False, affine=False),
    "frozen_mixed": Case(
        (4, 6, 5, 7), dtype=torch.bfloat16, params=torch.float32, training=False, relu=True
    ),
    "input_only": Case((4, 6, 5, 7), frozen=("weight", "bias"), relu=True),
    "weight_only": Case((4, 6, 5, 7), frozen=("x",), relu=True),
    "one_pixel": Case((8, 6, 1, 1), relu=True),
    "one_channel": Case((4, 1, 5, 5), relu=True),
    "empty": Case((0, 6, 5, 7), relu=True, residual=True),
}
EXACT = {name: case for name, case in CASES.items() if "innermost" not in name}


def gradients(y: Tensor, t: dict[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    names = [n for n, v in t.items() if v is not None and v.requires_grad]
    return dict(zip(names, torch.autograd.grad(y, [t[n] for n in names], grad), strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_norm_is_eager_bit_for_bit(name: str) -> None:
    case = EXACT[name]
    if case.shape[0] == 0:
        return _check_empty(case)
    expected_t, t = case.tensors(), case.tensors()
    expected = case.eager(expected_t)
    y, _, _, new_mean, new_var, _ = OPS.batch_norm(*case.args(t))
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    if case.training and expected_t["running_mean"] is not None:
        assert torch.equal(new_mean, expected_t["running_mean"])
        assert torch.equal(new_var, expected_t["running_var"])
    grad = torch.randn_like(expected)
    expected_grads = gradients(expected, expected_t, grad)
    grads = gradients(y, t, grad)
    assert list(grads) == list(expected_grads)
    for key, value in expected_grads.items():
        # In half precision throughout, aten's own deviation is rounded in other places.
        if name == "frozen_bfloat16" and key == "weight":
            torch.testing.assert_close(grads[key], value)
        else:
            assert torch.equal(grads[key], value), key
        assert grads[key].stride() == value.stride() and grads[key].dtype == value.dtype, key


def _check_empty(case: Case) -> None:
    t, other = case.tensors(), case.tensors()
    y, _, _, new_mean, _, _ = OPS.batch_norm(*case.args(t))
    expected = case.eager(other)
    assert y.shape == expected.shape and torch.equal(new_mean, other["running_mean"])
    grads = gradients(y, t, torch.zeros_like(y))
    for key, value in gradients(expected, other, torch.zeros_like(expected)).items():
        assert torch.equal(grads[key], value) and grads[key].shape == value.shape, key


@pytest.mark.parametrize("name", [n for n in CASES if "innermost" in n])
def test_norm_in_the_kernels_layout(name: str) -> None:
    """Output and gradients lie as the input does; values are eager's of the same numbers."""
    case = CASES[name]
    t, plain = case.tensors(), case.tensors()
    for key in ("x", "residual"):
        value = plain[key]
        if value is not None:
            plain[key] = value.detach().contiguous().requires_grad_()
    y = OPS.batch_norm(*case.args(t))[0]
    expected = case.eager(plain)
    assert torch.equal(y, expected) and y.stride() == t["x"].stride()
    grad = torch.randn_like(expected)
    grads = gradients(y, t, grad)
    for key, value in gradients(expected, plain, grad).items():
        assert torch.equal(grads[key], value), key
        if key in ("x", "residual"):
            assert grads[key].stride() == t[key].stride()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("saves", ["exact", "int8", "int4", "nothing"])
@pytest.mark.parametrize("name", CASES)
def test_norm_opcheck(name: str, saves: str) -> None:
    case = CASES[name]
    t = case.tensors()
    if saves == "nothing":
        t = {k: None if v is None else v.detach() for k, v in t.items()}
    torch.library.opcheck(OPS.batch_norm, case.args(t, saves))


@pytest.mark.parametrize("wants", [(True,) * 4, (True, False, True, False), (False, True) * 2])
@pytest.mark.parametrize("saves", ["exact", "int8", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_norm_backward_opcheck(name: str, saves: str, wants: tuple[bool, ...]) -> None:
    case = CASES[name]
    t = {k: None if v is None else v.detach() for k, v in case.tensors().items()}
    y, mean, invstd, _, _, code = OPS.batch_norm(*case.args(t, saves))
    x, residual = t["x"], t["residual"]
    assert x is not None
    seen = x if saves == "exact" else None
    head = (torch.randn_like(y), seen, code, t["weight"], t["bias"], mean, invstd, list(wants))
    shape = (list(x.shape), layouts.layout_of(x))
    tail = (case.training, case.relu, residual is not None, saves)
    torch.library.opcheck(OPS.batch_norm_backward, (*head, *shape, *tail))


@pytest.mark.parametrize("name", CASES)
def test_what_a_norm_keeps(name: str) -> None:
    """Its input, or codes by groups; mean and deviation; a bit where the mask is needed."""
    case = CASES[name]
    for saves in ("exact", "int8", "int4"):
        t = case.tensors()
        x, elements, channels = t["x"], t["x"].numel(), case.shape[1]
        stats = torch.float32 if case.options.get("params") or not case.training else case.dtype
        kept = saved_by(
            lambda t=t, saves=saves: OPS.batch_norm(*case.args(t, saves)), t["weight"], t["bias"]
        )
        size = sum(s.untyped_storage().nbytes() for s in kept)
        known = 2 * channels * stats.itemsize
        mask = (elements + 7) // 8
        if saves in BITS:
            groups = -(-elements // channels // 256)
            known += -(-channels * groups * 9 // 64) * 64 + -(-elements * BITS[saves] // 8)
            known += mask if case.relu and t["residual"] is not None else 0
        else:
            recomputed = t["residual"] is None and norm.recomputes(x, case.training)
            known += mask if case.relu and not recomputed else 0
            if name not in ("frozen_weight", "frozen_plain", "frozen_pure"):
                known += elements * case.dtype.itemsize
        assert size == known, saves
        assert saves == "exact" or x.data_ptr() not in {s.data_ptr() for s in kept} or not elements


def test_running_statistics_are_not_written() -> None:
    case = CASES["2d"]
    t = case.tensors()
    before = [t["running_mean"].clone(), t["running_var"].clone()]
    OPS.batch_norm(*case.args(t))
    assert torch.equal(t["running_mean"], before[0]) and torch.equal(t["running_var"], before[1])


def test_nan_reaches_output_and_gradient() -> None:
    for saves in ("exact", "int8", "int4"):
        case = CASES["2d_relu"]
        t, other = case.tensors(), case.tensors()
        for values in (t, other):
            values["x"].data[1, 2, 3, 4] = torch.nan
        y = OPS.batch_norm(*case.args(t, saves))[0]
        expected = case.eager(other)
        assert torch.equal(y.isnan(), expected.isnan()) and bool(y.isnan().any())
        grads = gradients(y, t, torch.ones_like(y))
        for key, value in gradients(expected, other, torch.ones_like(y)).items():
            assert torch.equal(grads[key].isnan(), value.isnan()), (saves, key)


@pytest.mark.parametrize("name", ["2d", "2d_relu", "2d_residual", "untracked", "plain_affine"])
def test_norm_gradcheck(name: str) -> None:
    case = CASES[name]
    wide = Case((3, 4, 2, 3), dtype=torch.float64, **case.options | {"relu": case.relu})
    t = wide.tensors()
    names = [n for n, v in t.items() if v is not None and v.requires_grad]

    def call(*leaves: Tensor) -> Tensor:
        y: Tensor = OPS.batch_norm(*wide.args(t | dict(zip(names, leaves, strict=True))))[0]
        return y

    assert torch.autograd.gradcheck(call, tuple(t[n] for n in names), fast_mode=True)


# ---- A byte an element, or half ------------------------------------------------------------------


@pytest.mark.parametrize("saves", BITS)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.shape[0]])
def test_mask_is_exact_and_error_bounded(name: str, saves: str) -> None:
    """x-hat within a cell; ReLU's mask, and what needs only it, as with exact saves."""
    case = CASES[name]
    t, other = case.tensors(), case.tensors()
    y, mean, invstd, _, _, code = OPS.batch_norm(*case.args(t, saves))
    exact = OPS.batch_norm(*case.args(other))
    assert torch.equal(y, exact[0])
    x = t["x"].detach().double()
    view = (1, -1, *[1] * (x.dim() - 2))
    normed = (x - mean.double().view(view)) * invstd.double().view(view)
    layout = layouts.layout_of(t["x"])
    decoded = decode(code, x.shape, layout, saves)[0].double()
    # Of roots, a cell is at most this: its widest in x-hat is at the ends, and 254 or 14 are there.
    root = normed.abs().sqrt()
    cell = 2 * root.amax() / (2 ** BITS[saves] - 4)
    room = cell * (2 * root + cell) * (0.5 if saves == "int8" else 1) + 1e-5 * (1 + normed.abs())
    assert bool(((decoded - normed).abs() <= room).all())
    grad = torch.randn_like(y)
    grads, expected = gradients(y, t, grad), gradients(exact[0], other, grad)
    for key in ("residual", "bias"):
        if key in grads:
            assert torch.equal(grads[key], expected[key]), key
    if not case.training and "x" in grads:
        assert torch.equal(grads["x"], expected["x"])


def test_int8_gradient_error() -> None:
    """Normal channels of 6272 elements, gradients of pure noise: measured, relative to the norm,
    0.00015 for x, 0.006 for weights (sums in which almost all cancels) and 0 for biases.
    """
    torch.manual_seed(0)
    shape = (8, 32, 28, 28)
    x = torch.randn(shape)
    for residual in (None, torch.randn(shape)):
        found = []
        for saves in ("exact", "int8"):
            leaves = [x.clone().requires_grad_(), torch.rand(32).add_(0.5).requires_grad_()]
            torch.manual_seed(1)
            leaves[1].data.uniform_(0.5, 1.5)
            bias = torch.zeros(32).uniform_(-0.5, 0.5).requires_grad_()
            args = (leaves[0], residual, leaves[1], bias, None, None, True, 0.1, 1e-5, True, saves)
            grad = torch.randn(shape)
            found.append(torch.autograd.grad(OPS.batch_norm(*args)[0], (*leaves, bias), grad))
        errors = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
        assert errors[0] < 3e-4 and errors[1] < 1e-2 and errors[2] == 0


@pytest.mark.parametrize("weight", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("bias", [-9.0, -0.5, 0.0, 0.5, 9.0])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("saves", BITS)
def test_mask_at_the_edges(saves: str, weight: float, bias: float, constant: bool) -> None:
    """Channels all active, all inactive, constant, of zero or negative weight."""
    x = leaf((4, 3, 5, 5))
    if constant:
        x.data.fill_(1.5)
    w, b = torch.full((3,), weight), torch.full((3,), bias, requires_grad=True)
    y = OPS.batch_norm(x, None, w, b, None, None, True, 0.1, 1e-5, True, saves)[0]
    (grad,) = torch.autograd.grad(y, b, torch.ones_like(y))
    assert torch.equal(grad, (y > 0).sum((0, 2, 3)).float())
