"""When masks change and by how much, against the formulas of the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swatfx
from swatfx.density import Density
from swatfx.errors import AttachError, PolicyError
from swatfx.masks.rules import GROWS
from swatfx.masks.schedule import Schedule
from swatfx.policy import Policy

SETTINGS = settings(deadline=None, max_examples=60)


def _due(
    policy: Policy, epoch: int | None = None, total: int | None = None, last: int = 0
) -> list[int]:
    schedule = Schedule(policy, epoch, total)
    schedule.check()
    return [step for step in range(1, (last or total or 0) + 1) if schedule.is_due(step)]


def test_updates_come_once_an_epoch_and_not_after_the_last_step() -> None:
    assert _due(swatfx.set_(0.9), 10, 40) == [10, 20, 30]
    assert _due(swatfx.snfs(0.9), 10, 35) == [10, 20, 30]
    assert _due(swatfx.set_(0.9), 10, None, last=40) == [10, 20, 30, 40]  # the end is not known


def test_soft_filters_are_zeroed_after_the_last_step_too() -> None:
    assert _due(swatfx.soft_filter(0.5), 10, 40) == [10, 20, 30, 40]


def test_a_grow_rule_says_whether_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(swatfx.set_(0.9), grow="mine")
    for rests, last in ((True, 30), (False, 40)):
        monkeypatch.setitem(GROWS, "mine", replace(GROWS["random"], rests=rests))
        assert _due(policy, 10, 40)[-1] == last


def test_updates_end_at_their_fraction_of_training() -> None:
    assert _due(swatfx.rigl(0.9), None, 1000) == [100, 200, 300, 400, 500, 600, 700]
    assert _due(swatfx.rigl(0.9, update_every=7), None, 40) == [7, 14, 21, 28]
    assert _due(swatfx.rigl(0.9), None, 1000, last=2000)[-1] == 700  # nor beyond the end


def test_a_ramp_ends_on_its_target_between_two_updates() -> None:
    assert _due(swatfx.gradual_magnitude(0.9), None, 500) == [100, 200, 300, 375]
    assert _due(swatfx.gradual_magnitude(0.9, update_until=1.0), None, 250) == [100, 200, 250]


@pytest.mark.parametrize("policy", ["static:0.9", "swat-u:0.9", "swat-frozen:0.9", "saw:0.9"])
def test_what_changes_no_mask_is_never_due(policy: str) -> None:
    assert _due(swatfx.policy.parse(policy), 10, 40) == []


def test_cosine_by_hand() -> None:
    schedule = Schedule(swatfx.rigl(0.9), None, 400)  # ends at 300
    found = [schedule.fraction(step) for step in (0, 100, 150, 200, 300, 400)]
    assert found == pytest.approx([0.3, 0.225, 0.15, 0.075, 0, 0], abs=1e-12)


@SETTINGS
@given(st.integers(2, 10_000), st.floats(0.01, 1), st.floats(0, 1))
def test_cosine_falls_from_the_fraction_to_none(total: int, until: float, fraction: float) -> None:
    policy = swatfx.rigl(0.9, update_until=until, drop_fraction=fraction)
    schedule = Schedule(policy, None, total)
    steps = range(0, total + 1, max(1, total // 50))
    values = [schedule.fraction(step) for step in steps]
    assert values[0] == pytest.approx(fraction)
    assert all(a >= b - 1e-12 for a, b in zip(values, values[1:], strict=False))
    end = max(1, math.floor(until * total))
    assert schedule.fraction(end) == pytest.approx(0, abs=1e-12)


def test_constant_fraction() -> None:
    schedule = Schedule(swatfx.set_(0.9), 10, 100)
    assert {schedule.fraction(step) for step in range(101)} == {0.3}


def test_cubic_by_hand() -> None:
    """s_t = s (1 - (1 - t/T)^3): 0.8 * 7/8 = 0.7 half way."""
    schedule = Schedule(swatfx.gradual_magnitude(0.8), None, 400)
    target = Density.from_sparsity(0.8)
    found = [schedule.density(target, step).value for step in (0, 75, 150, 225)]
    assert found == pytest.approx([1, 1 - 0.8 * 37 / 64, 0.3, 1 - 0.8 * 63 / 64])
    for step in (300, 301, 10_000):
        assert schedule.density(target, step) is target  # exact again, as the user wrote it


@SETTINGS
@given(st.integers(2, 10_000), st.floats(0.01, 1), st.floats(0, 0.99))
def test_cubic_falls_from_dense_to_the_target(total: int, until: float, sparsity: float) -> None:
    policy = swatfx.gradual_magnitude(sparsity, update_until=until)
    schedule = Schedule(policy, None, total)
    target = Density.from_sparsity(sparsity)
    values = [schedule.density(target, step).value for step in range(0, total + 1)]
    assert values[0] == 1 and values[-1] == target.value
    assert all(a >= b - 1e-12 for a, b in zip(values, values[1:], strict=False))


def test_densities_without_a_ramp_stay() -> None:
    target = Density.from_sparsity(0.9)
    assert Schedule(swatfx.rigl(0.9), None, 100).density(target, 3) is target


def test_the_active_set_is_held_from_its_epoch_on() -> None:
    schedule = Schedule(swatfx.swat_frozen(0.9, 2), 10)
    assert [schedule.holds_after(step) for step in (0, 19, 20, 21)] == [False, False, True, True]
    for policy in (swatfx.swat_u(0.9), swatfx.static(0.9)):  # never, and from the start
        assert not Schedule(policy, 10).holds_after(100)


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (swatfx.set_(0.9), {"steps_per_epoch"}),
        (swatfx.snfs(0.9), {"steps_per_epoch", "total_steps"}),
        (swatfx.snfs(0.9, update_every=5), {"total_steps"}),
        (swatfx.rigl(0.9), {"total_steps"}),
        (swatfx.rigl(0.9, drop_decay="constant", update_until=1.0), set()),
        (swatfx.rigl(0.9, drop_decay="constant"), {"total_steps"}),
        (swatfx.gradual_magnitude(0.9), {"total_steps"}),
        (swatfx.dsr(0.9), set()),
        (swatfx.soft_filter(0.9), {"steps_per_epoch"}),
        (swatfx.swat_frozen(0.9), {"steps_per_epoch"}),
        (swatfx.swat_frozen(0.9, 0), set()),
        (swatfx.static(0.9), set()),
        (swatfx.swat_u(0.9), set()),
    ],
    ids=lambda value: value.name if isinstance(value, Policy) else "",
)
def test_missing_numbers_are_named(policy: Policy, wanted: set[str]) -> None:
    known = {"steps_per_epoch": 10, "total_steps": 100}
    for name in known:
        schedule = Schedule(policy, **{k: v for k, v in known.items() if k != name})
        if name in wanted:
            with pytest.raises(AttachError, match=rf"{policy.name}.*{name}.*swatfx\.attach"):
                schedule.check()
        else:
            schedule.check()


@pytest.mark.parametrize("name", ["steps_per_epoch", "total_steps"])
def test_numbers_below_one_are_refused(name: str) -> None:
    for value in (0, -3):
        with pytest.raises(AttachError, match=f"{name} must be at least 1.*{value}"):
            Schedule(swatfx.swat_u(0.9), **{name: value}).check()


def test_fields_that_make_no_schedule_are_refused() -> None:
    for field, value in {
        "hold_from_epoch": -1,
        "update_every": 1.5,
        "drop_fraction": 1.1,
        "update_until": 0.0,
        "ramp": "linear",
        "drop_decay": "step",
        "zero_inactive": "sometimes",
        "assumed_activation_density": 0.0,
        "penalty": -1.0,
    }.items():
        with pytest.raises(PolicyError, match=field):
            replace(swatfx.swat_u(0.9), **{field: value})
    for change in ({"drop": "magnitude"}, {"grow": "random"}, {"ramp": "cubic"}):
        with pytest.raises(PolicyError, match="hold_from_epoch=0"):
            replace(swatfx.swat_u(0.9), **change)
    for when in ("updates", "always"):
        with pytest.raises(PolicyError, match=f"zero_inactive='{when}'.*hold_from_epoch"):
            replace(swatfx.swat_u(0.9), zero_inactive=when)
