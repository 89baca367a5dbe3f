"""Assertions and `if ...: raise` stay in the graph as checks; swallowed errors are noticed."""

import pytest
import torch

from tests.nets.compare import assert_matches_at_density_1, skipped
from tests.nets.guarded_nets import SWALLOWERS, Base, Guards

torch.set_num_threads(1)


def test_guard_clauses_become_checks() -> None:
    gm = assert_matches_at_density_1(Guards(), torch.randn(3, 4))
    assert not gm.eager
    cases = {
        (2, 3, 4): AssertionError,
        (3, 5): ValueError,
        (0, 4): RuntimeError,
        (10, 4): RuntimeError,
        (1, 4): AssertionError,
        (7, 4): AssertionError,
        (6, 4): IndexError,
        (5, 4): AssertionError,
    }
    for shape, error in cases.items():
        with pytest.raises(error):
            Guards()(torch.zeros(shape))
        with pytest.raises(error):
            gm(torch.zeros(shape))


@pytest.mark.parametrize("kind", SWALLOWERS)
@pytest.mark.parametrize("nested", [False, True])
def test_errors_that_the_model_swallows_are_control_flow(kind: type[Base], nested: bool) -> None:
    model = torch.nn.Sequential(kind(), torch.nn.Linear(4, 4)) if nested else kind()
    x = torch.randn(3, 4)
    gm = assert_matches_at_density_1(model, x)
    assert set(gm.eager) == ({"0"} if nested else {""})
    assert all("untraceable" in reason for reason in gm.eager.values())
    assert set(skipped(gm, x).values()) == {None}
