"""What takes part in a round, how far islands have drifted, and when they are reset."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.rounds import Drift, drift, exceeds, outlier, reset_from, rules
from orchestrator.state import RunState
from tests.orchestrator.story import A, B, Story, plan


def table(**rounds: Any) -> dict[str, Any]:
    """The [rounds] of a plan."""
    return {**plan()["rounds"], **rounds}


def rounds_of(*norms: float, reset: str = "", **table_of: Any) -> RunState:
    """A run whose island A contributed updates of these norms, one a round; `reset` named by the last."""
    story = Story(rounds=table(**table_of))
    for number, norm in enumerate(norms, start=1):
        last = reset if number == len(norms) else ""
        story.contribute(A, number=number).collect(A, number=number, norm=norm).close(A, reset_from=last)
    return story.state


# ---- drift


def test_one_island_cannot_drift() -> None:
    assert drift({A: {"w": [1.0, 2.0]}}) is None
    assert drift({}) is None


def test_equal_bases_are_not_apart() -> None:
    sketch = {"w": [1.0, 2.0, 4.0], "zero": [0.0, 0.0, 0.0]}
    found = drift({A: sketch, B: dict(sketch)})
    assert found is not None
    assert found.value == 0.0


def test_the_drift_is_relative_to_the_tensor_s_norm() -> None:
    found = drift({A: {"w": [1.0, 2.0, 25.0]}, B: {"w": [1.0, 1.0, 25.0]}})
    assert found == Drift(pytest.approx(math.sqrt(1 / 2 / 25)), "w", (A, B))


def test_a_tensor_that_only_one_island_has_lost_is_infinitely_far() -> None:
    assert drift({A: {"w": [1.0, 0.0]}, B: {"w": [0.0, 0.0]}}) == Drift(math.inf, "w", (A, B))


def test_the_largest_drift_of_any_pair_and_tensor_is_told() -> None:
    sketches = {
        "c": {"v": [1.0, 1.0], "w": [1.5, 1.0]},
        "a": {"v": [1.0, 1.0], "w": [1.0, 1.0]},
        "b": {"v": [1.0, 1.0], "w": [1.1, 1.0]},
    }
    assert drift(sketches) == Drift(0.5, "w", ("a", "c"))


def test_a_drift_is_too_large_above_the_bound() -> None:
    state = rounds_of(max_drift=0.1)
    assert not exceeds(None, state)
    assert not exceeds(Drift(0.1, "w", (A, B)), state)
    assert exceeds(Drift(0.11, "w", (A, B)), state)


# ---- outliers


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_what_is_not_finite_never_takes_part(norm: float) -> None:
    assert outlier(norm, rounds_of()) == "it is not finite"


def test_the_first_norms_are_believed() -> None:
    assert outlier(1e9, rounds_of(1.0, 1.0)) is None
    assert outlier(1e9, rounds_of(1.0, 1.0, 1.0)) is not None


def test_an_outlier_is_measured_by_the_median() -> None:
    state = rounds_of(1.0, 2.0, 300.0, 3.0, 2.5, max_norm_ratio=4.0)
    assert outlier(10.0, state) is None
    assert outlier(10.1, state) == (
        "its norm is 10.1, the median of 5 before it is 2.5; rounds.max_norm_ratio allows 4 times that"
    )


def test_norms_of_long_ago_are_forgotten() -> None:
    old = [100.0] * 20
    assert outlier(30.0, rounds_of(*old, *[1.0] * 9)) is not None
    assert outlier(999.0, rounds_of(*[1.0] * 20, *old)) is None


def test_norms_of_updates_that_took_no_part_do_not_count() -> None:
    story = Story()
    for number in (1, 2, 3, 4):
        story.contribute(A, B, number=number).collect(A, number=number, norm=1.0)
        story.collect(B, number=number, norm=50.0).close(A)
    assert outlier(11.0, story.state) is not None


# ---- resets


@pytest.mark.parametrize(("every", "named"), [(1, A), (2, A), (3, ""), (4, A), (5, "")])
def test_a_reset_is_announced_a_round_before_it_is_due(every: int, named: str) -> None:
    """Two rounds are closed: the third tells what the fourth will be."""
    assert reset_from(rounds_of(1.0, 1.0, reset_every=every), [B, A], None) == named


def test_a_drift_that_is_too_large_calls_for_a_reset() -> None:
    state = rounds_of(1.0)
    assert reset_from(state, [A, B], Drift(1e-3, "w", (A, B))) == A
    assert reset_from(state, [B], Drift(1e-3, "w", (A, B))) == B
    assert reset_from(state, [A, B], Drift(1e-5, "w", (A, B))) == ""


def test_a_reset_that_happens_now_is_not_called_for_again() -> None:
    state = rounds_of(1.0, reset=A)
    assert reset_from(state, [A, B], Drift(1e-3, "w", (A, B))) == ""


def test_a_reset_that_was_missed_is_called_for_again() -> None:
    state = rounds_of(1.0, reset=A)
    assert reset_from(state, [B], None) == B


def test_one_island_alone_is_never_reset() -> None:
    state = rounds_of(1.0, reset_every=1)
    del state.islands[B]
    assert reset_from(state, [A], None) == ""


def test_a_plan_of_before_these_rules_has_the_usual_ones() -> None:
    old = {k: v for k, v in table().items() if k not in ("max_norm_ratio", "max_drift", "reset_every")}
    assert rules(Story(rounds=old).state).max_norm_ratio == 10.0
