"""How rounds end, and what the machine is told to be."""

from __future__ import annotations

import pytest

from swatfx.timing.machine import TUNED, allocator, allocator_advice
from swatfx.timing.rounds import Limit, alternate

pytestmark = pytest.mark.usefixtures("spare_time")


@pytest.mark.parametrize(("limit", "count"), [(Limit(0.0, 3), 3), (Limit(), 7), (Limit(0.0, 9), 7)])
def test_rounds_end_when_the_time_is_up(limit: Limit, count: int) -> None:
    rounds = alternate({"a": lambda: {"seconds": 1.0}}, 7, limit=limit)
    assert rounds == {"a": {"seconds": [1.0] * count}}


def test_the_allocators_settings_are_advised_where_they_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert allocator() is None and f"export GLIBC_TUNABLES={TUNED}" in (allocator_advice() or "")
    monkeypatch.setenv("GLIBC_TUNABLES", TUNED)
    assert allocator() == TUNED and allocator_advice() is None
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert allocator_advice() is None
