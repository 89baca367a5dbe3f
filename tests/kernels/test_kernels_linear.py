"""The C kernels of linear layers against the plain-torch definition."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from swatfx import kernels

OPS = torch.ops.swatfx
pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")


def run(
    shape: tuple[int, ...],
    outputs: int,
    *,
    bias: bool = True,
    weight_threshold: float = 0.7,
    activation_threshold: float = 0.8,
    kept_dtype: torch.dtype | None = None,
    sparse: str = "w/wa",
    transposed_weight: bool = False,
) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    w = torch.randn(outputs, shape[-1])
    w = (w.t().contiguous().t() if transposed_weight else w).requires_grad_()
    b = torch.randn(outputs, requires_grad=True) if bias else None
    a_t = torch.tensor(activation_threshold)
    kept = OPS.pack(x.detach(), a_t, 0, "nchw", kept_dtype or x.dtype, "row_major")
    options = {"sparse": sparse, "kept_dtype": kept_dtype, "sparse_kernels": True}
    if "a" in sparse.partition("/")[0]:
        options["activation_state"] = a_t
    if "g" in sparse:
        options["gradient_density"] = "1/2"
    y = OPS.linear(x, w, b, torch.tensor(weight_threshold), kept, **options)
    y.backward(torch.randn_like(y))
    assert x.grad is not None and w.grad is not None
    return [y.detach(), x.grad, w.grad, *([] if b is None else [b.grad])]


def check(*args: object, **options: object) -> None:
    fast = run(*args, **options)  # type: ignore[arg-type]
    with kernels.reference_only():
        expected = run(*args, **options)  # type: ignore[arg-type]
    for one, other in zip(fast, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kept_dtype": torch.bfloat16},
        {"transposed_weight": True},
        {"weight_threshold": 0.0, "activation_threshold": 0.0},
        {"weight_threshold": 9.0, "activation_threshold": 9.0},
        {"sparse": "wa/wa"},
        {"sparse": "w/wag"},
        {"sparse": "w/wa!"},
        {"sparse": "/wa"},
    ],
    ids=str,
)
def test_kernel_equals_reference(options: dict[str, object]) -> None:
    check((5, 7, 40), 33, **options)
    check((64, 130), 50, **options)


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(seed: int) -> None:
    pick = random.Random(seed)
    rows = pick.choice([1, 3, 15, 16, 17, 31, 64, 300, 1000])
    check(
        (rows, pick.choice([1, 5, 16, 63, 64, 65, 200])),
        pick.choice([1, 7, 16, 33, 130, 400]),
        weight_threshold=pick.choice([0, 0.7, 1.5]),
        activation_threshold=pick.choice([0, 0.5, 1.5]),
    )


def test_same_bits_whatever_the_threads() -> None:
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(run((100, 300), 70))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# opcheck looks at the gradients of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    x, w = torch.randn(20, 30, requires_grad=True), torch.randn(40, 30, requires_grad=True)
    kept = OPS.pack(x.detach(), torch.tensor(0.8), 0, "nchw", x.dtype, "row_major")
    args = (x, w, None, torch.tensor(0.7), kept)
    torch.library.opcheck(OPS.linear, args, {"sparse_kernels": True})
