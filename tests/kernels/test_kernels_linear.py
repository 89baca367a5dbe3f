"""The C kernels of linear layers against the plain-torch definition."""

from __future__ import annotations

import random

import pytest
import torch

from swatfx import kernels
from tests.nets.kernel_calls import run_linear

OPS = torch.ops.swatfx
pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")


def check(*args: object, **options: object) -> None:
    fast = run_linear(*args, **options)  # type: ignore[arg-type]
    with kernels.reference_only():
        expected = run_linear(*args, **options)  # type: ignore[arg-type]
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
            results.append(run_linear((100, 300), 70))
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
