"""Law 3, and what it does not count: what others ended before it trained, and what would only fail again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.chain import why_stuck
from tests.orchestrator.story import A, B, Story, key, plan

LIMIT, DRAIN, RESERVED = 1800.0, 60.0, 1_000_000
LAW_3 = "two segments without a new checkpoint (law 3); the last: "


def stuck(story: Story) -> str | None:
    return why_stuck(story.state.islands[A], story.state.plan_of(A))


def ended(
    story: Story,
    number: int,
    *,
    outcome: str = "",
    job: str = "completed",
    reason: str = "",
    seconds: float | None = 10.0,
    steps: int = 0,
    amount: int = 1000,
    final: bool = False,
) -> Story:
    """One more segment of A; `seconds` that it ran, None for one that never began."""
    story.intend(A, sequence=number)
    if steps:
        story.train(A, 1, steps, sequence=number)
    if outcome:
        facts = {"outcome": outcome, "reason": reason, "final": final}
        story.add(site_kinds.SEGMENT_ENDED, at=A, segment=number, **facts)
    began = 0.0 if seconds is None else story.clock
    times = {"started": began, "ended": story.clock + (seconds or 0.0)}
    return story.job(A, "ended", number, outcome=job, **times).settle(A, number, amount)


def chain(*segments: dict[str, object]) -> Story:
    story = Story().start(B).end(B).settle(B)
    for number, facts in enumerate(segments):
        ended(story, number, **facts)  # type: ignore[arg-type]
    return story


STOPPED = {"outcome": "drained", "reason": "stop requested"}
PREEMPTED = {"job": "cancelled"}
SIGNALLED = {"outcome": "drained", "reason": "signal received", "job": "cancelled"}
NEVER_BEGAN = {"job": "cancelled", "seconds": None, "amount": 0}
CRASHED = {"outcome": "failed", "reason": "rank 0 died", "job": "failed"}


def test_the_plan_of_these_tests_is_as_they_say() -> None:
    island = next(i for i in plan()["islands"] if i["site"] == A)
    assert (island["time_limit_seconds"], island["drain_seconds"]) == (LIMIT, DRAIN)


@pytest.mark.parametrize("excused", [STOPPED, PREEMPTED, SIGNALLED, NEVER_BEGAN])
def test_what_others_ended_before_it_trained_says_nothing(excused: dict[str, object]) -> None:
    assert stuck(chain(*[excused] * 5)) is None
    assert stuck(chain(CRASHED, excused)) is None
    assert stuck(chain(CRASHED, excused, CRASHED)) == LAW_3 + "rank 0 died"


@pytest.mark.parametrize("excused", [STOPPED, PREEMPTED, SIGNALLED])
def test_a_segment_that_trained_counts_however_it_ended(excused: dict[str, object]) -> None:
    assert stuck(chain({**excused, "steps": 1}, {**excused, "steps": 1})) is not None


@pytest.mark.parametrize(
    "facts", [SIGNALLED, {"outcome": "drained", "reason": "time limit of 1800 s"}, {"job": "timeout"}]
)
def test_its_own_time_limit_is_nobody_elses_doing(facts: dict[str, object]) -> None:
    """Slurm's signal before the limit looks like a cancellation; when it came tells them apart."""
    late = {**facts, "seconds": LIMIT - DRAIN - 30.0}
    assert stuck(chain(late, late)) is not None


def test_a_job_that_failed_before_it_began_counts() -> None:
    failed = {"job": "failed", "seconds": None, "amount": 0}
    assert stuck(chain(failed, failed)) == LAW_3 + "it ended without a word"


@given(st.lists(st.integers(0, RESERVED // 2), max_size=12))
def test_excuses_burn_no_more_than_two_segments_may(amounts: list[int]) -> None:
    """However a site preempts: the chain has stopped before it burnt two reservations and one excuse more."""
    story, burnt = chain(), 0
    for number, amount in enumerate(amounts):
        if stuck(story):
            assert burnt > RESERVED
            return
        ended(story, number, job="cancelled", amount=amount)
        burnt += amount
        assert burnt <= 2 * RESERVED + 2 * (RESERVED // 2)


def test_what_would_fail_alike_stops_the_chain_at_once() -> None:
    bad = {"outcome": "failed", "reason": "rank 1: data/text: token 7 is none of 5", "final": True}
    story = chain({**bad, "steps": 3})
    assert stuck(story) == "another segment would fail alike: rank 1: data/text: token 7 is none of 5"


def test_an_operator_who_resumes_wants_another_try() -> None:
    story = chain({"outcome": "failed", "reason": "diverged", "final": True})
    story.add(kinds.ISLAND_GIVEN_UP, site=A)
    story.add(kinds.RUN_RESUMED)
    assert stuck(story) is None
    assert story.state.segment(key(A)).final
