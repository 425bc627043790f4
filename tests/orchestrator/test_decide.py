"""What is due next, as tables: laws 1, 2, 3 and 7."""

from __future__ import annotations

import copy

import pytest

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.choices import (
    Action,
    Close,
    Collect,
    Deliver,
    Drain,
    End,
    GiveUp,
    Intend,
    Release,
    Settle,
    Submit,
)
from orchestrator.decide import Facts, decide
from tests.orchestrator.story import DEADLINE, A, B, Story, key, plan

LAG = 5.0


def due(story: Story, *, later: float = 0.0, **absent: float) -> list[Action]:
    """What is due so many seconds after the story's last event; `absent` by site, in seconds."""
    keys = {i.site: i.segments[-1].key for i in story.state.islands.values() if i.segments}
    gone = {keys[site.replace("_", "-")]: seconds for site, seconds in absent.items()}
    return decide(story.state, Facts(story.clock + later, gone, {A: LAG, B: LAG}))


def due_alike(story: Story, *, later: float = 0.0) -> list[Action]:
    """What is due where all sites have the same lag, and answer."""
    return decide(story.state, Facts(story.clock + later, {}, dict.fromkeys(story.state.islands, LAG)))


def alone(**changes: object) -> Story:
    """A run whose other island has done its part."""
    story = Story(**changes).start(B)
    return story.end(B).settle(B)


# ---- the chain


def test_each_island_begins_with_its_first_segment() -> None:
    assert due(Story()) == [Intend(A, 0), Intend(B, 0)]


@pytest.mark.parametrize("state", ["pending", "running", "unknown", "suspended"])
def test_a_segment_that_is_not_over_is_never_followed_by_another(state: str) -> None:
    assert due(Story().intend(A, B).job(A, state).job(B, state), later=1e6) == []


def test_an_ended_job_is_settled_before_the_next_segment() -> None:
    story = alone().start(A).end(A, outcome="drained")
    assert due(story) == [Settle(A, key(A))]
    assert due(story.settle(A)) == [Intend(A, 1)]


def test_a_run_that_has_ended_has_nothing_due() -> None:
    story = Story()
    story.add(kinds.RUN_ENDED)
    assert due(story) == []


def test_a_completed_island_gets_no_further_segment() -> None:
    story = Story().start(A, B).end(B).settle(B)
    assert due(story) == []


# ---- law 2: unknown never acts


def test_a_silent_site_is_left_alone() -> None:
    story = Story().intend(A, B)
    assert due(story, later=1e6) == []
    assert decide(story.state, Facts(1e6, {}, {A: 0.0, B: 0.0})) == []


@pytest.mark.parametrize("stopping", [False, True])
def test_an_absence_younger_than_the_lag_is_no_answer(stopping: bool) -> None:
    story = Story().intend(A, B)
    if stopping:
        story.add(kinds.STOP_REQUESTED)
    assert due(story, later=1e6, local_a=LAG - 0.01, local_b=0.0) == []


def test_an_older_absence_submits_the_same_key_again() -> None:
    assert due(Story().intend(A, B), local_a=LAG) == [Submit(A, key(A))]


def test_each_site_has_a_lag_of_its_own() -> None:
    state = Story().intend(A, B).state
    absent = {key(A): 10.0, key(B): 10.0}
    assert decide(state, Facts(0.0, absent, {A: 300.0, B: 5.0})) == [Submit(B, key(B))]


def test_a_job_that_was_seen_is_not_submitted_again_because_its_site_forgot_it() -> None:
    story = Story().intend(A, B).job(A, "pending").job(B, "running")
    assert due(story, local_a=1e6, local_b=1e6) == []


def test_an_island_given_up_releases_what_was_never_submitted() -> None:
    story = alone().intend(A)
    story.add(kinds.ISLAND_GIVEN_UP, site=A)
    assert due(story) == []
    assert due(story, local_a=LAG) == [Release(A, key(A))]


# ---- stop


def test_a_stop_drains_what_lives_and_releases_what_was_never_submitted() -> None:
    story = Story().start(A).intend(B)
    story.add(kinds.STOP_REQUESTED)
    assert due(story) == [Drain(A, key(A))]
    assert due(story, local_b=LAG) == [Drain(A, key(A)), Release(B, key(B))]


def test_a_stop_starts_nothing_and_ends_when_all_is_over() -> None:
    story = Story().start(A).intend(B).contribute(A)
    story.add(kinds.STOP_REQUESTED)
    story.add(kinds.SEGMENT_RELEASED, site=B, key=key(B))
    assert due(story) == [Drain(A, key(A))]
    story.end(A, outcome="drained")
    assert due(story) == [Settle(A, key(A))]
    assert due(story.settle(A)) == [End("stopped", "an operator asked for it")]


def test_a_stop_before_the_first_segment_ends_at_once() -> None:
    story = Story()
    story.add(kinds.STOP_REQUESTED)
    assert due(story) == [End("stopped", "an operator asked for it")]


def test_a_stop_of_a_run_that_completes_meanwhile_is_a_completion() -> None:
    story = Story().start(A, B)
    story.add(kinds.STOP_REQUESTED)
    story.end(A).settle(A).end(B).settle(B)
    assert due(story) == [End("completed", "all islands trained all their steps")]


# ---- law 3: two segments without a checkpoint stop the chain


def failing(*checkpoints: bool) -> Story:
    """Segments of A that failed one after the other, with or without a checkpoint of their own."""
    story = alone()
    for number, saved in enumerate(checkpoints):
        story.start(A, sequence=number)
        if saved:
            story.add(site_kinds.CHECKPOINT_SAVED, at=A, segment=number)
        story.add(site_kinds.SEGMENT_ENDED, at=A, segment=number, outcome="failed", reason=f"fault {number}")
        story.job(A, "ended", number, outcome="failed").settle(A, number)
    return story


@pytest.mark.parametrize("checkpoints", [(False,), (False, True), (True, False), (False, True, False)])
def test_a_chain_that_saves_goes_on(checkpoints: tuple[bool, ...]) -> None:
    assert due(failing(*checkpoints)) == [Intend(A, len(checkpoints))]


@pytest.mark.parametrize("checkpoints", [(False, False), (True, False, False)])
def test_two_segments_in_a_row_without_a_checkpoint_give_up(checkpoints: tuple[bool, ...]) -> None:
    last = f"fault {len(checkpoints) - 1}"
    why = f"two segments without a new checkpoint (law 3); the last: {last}"
    assert due(failing(*checkpoints)) == [GiveUp(A, why)]


def test_a_segment_that_never_ran_is_no_failure_of_the_chain() -> None:
    story = failing(False)
    story.intend(A, sequence=1).add(kinds.SEGMENT_RELEASED, key=key(A, 1))
    assert due(story) == [Intend(A, 2)]


@pytest.mark.parametrize("word", ["failed", None])
def test_giving_up_says_what_is_known(word: str | None) -> None:
    story = alone()
    for number in (0, 1):
        story.start(A, sequence=number)
        if word:
            story.add(site_kinds.SEGMENT_ENDED, at=A, segment=number, outcome=word, reason="")
        story.job(A, "ended", number).settle(A, number)
    (action,) = due(story)
    assert isinstance(action, GiveUp)
    assert action.reason.endswith(f"the last: {word or 'it ended without a word'}")


def test_a_run_with_an_island_given_up_has_failed() -> None:
    story = failing(False, False)
    story.add(kinds.ISLAND_GIVEN_UP, reason="burnt out")
    assert due(story) == [End("failed", f"{A}: burnt out")]


def test_a_failed_run_names_every_island_that_was_given_up() -> None:
    story = Story()
    story.add(kinds.ISLAND_GIVEN_UP, site=A, reason="no units")
    story.add(kinds.ISLAND_GIVEN_UP, site=B, reason="burnt out")
    assert due(story) == [End("failed", f"{A}: no units; {B}: burnt out")]


def test_resuming_gives_a_chain_two_new_segments() -> None:
    story = failing(False, False)
    story.add(kinds.ISLAND_GIVEN_UP)
    story.add(kinds.RUN_ENDED, outcome="failed")
    story.add(kinds.RUN_RESUMED)
    assert due(story) == [Intend(A, 2)]
    story.start(A, sequence=2).job(A, "ended", 2).settle(A, 2)
    assert due(story) == [Intend(A, 3)]
    story.start(A, sequence=3).job(A, "ended", 3).settle(A, 3)
    assert isinstance(due(story)[0], GiveUp)


def test_resuming_a_chain_that_was_not_given_up_forgives_nothing() -> None:
    story = failing(False)
    story.add(kinds.RUN_RESUMED)
    story.start(A, sequence=1).job(A, "ended", 1).settle(A, 1)
    assert isinstance(due(story)[0], GiveUp)


# ---- law 7: rounds


def test_an_update_is_collected_and_then_waits_for_the_island_at_work() -> None:
    story = Story().start(A, B).contribute(A)
    assert due(story) == [Collect(1, A)]
    assert due(story.collect(A)) == []
    assert due(story.contribute(B)) == [Collect(1, B)]
    assert due(story.collect(B)) == [Close(1, (A, B), ())]


@pytest.mark.parametrize(
    ("other", "waits"),
    [
        (Story().start(A), False),  # B has no segment yet
        (Story().start(A).intend(B).job(B, "pending"), False),
        (Story().start(A, B), True),
        (Story().start(A, B).end(B).settle(B), False),
    ],
    ids=["none", "queued", "running", "completed"],
)
def test_only_an_island_at_work_is_waited_for(other: Story, waits: bool) -> None:
    other.contribute(A).collect(A)
    assert (Close(1, (A,), ()) in due(other)) is not waits


def test_an_island_given_up_is_not_waited_for() -> None:
    story = Story().start(A, B).contribute(A).collect(A)
    assert due(story) == []
    story.add(kinds.ISLAND_GIVEN_UP, site=B)
    assert due(story) == [Close(1, (A,), ())]


def test_the_deadline_closes_without_the_late() -> None:
    """Half of what an island waits, so that the closed round reaches it in time; no update, no deadline."""
    story = Story().start(A, B).contribute(A).collect(A)  # collecting has taken a second
    assert due(story, later=DEADLINE / 2 - 1.01) == []
    assert due(story, later=DEADLINE / 2 - 1.0) == [Close(1, (A,), (B,))]
    assert due(Story().start(A, B), later=1e6) == []


def test_the_deadline_runs_from_the_first_update_by_the_database_s_clock() -> None:
    story = Story().start(A, B)
    first = story.add(site_kinds.ROUND_CONTRIBUTED, at=A, time=5.0)
    story.clock += 30.0
    story.contribute(B).collect(A)
    late = first.received + DEADLINE / 2 - story.clock
    assert due(story, later=late - 0.01) == [Collect(1, B)]
    assert due(story, later=late) == [Collect(1, B), Close(1, (A,), (B,))]


def test_no_round_closes_empty() -> None:
    story = Story().start(A, B).contribute(A)
    assert due(story, later=1e6) == [Collect(1, A)]


def test_a_refused_update_takes_no_part() -> None:
    story = Story().start(A, B).contribute(A, B).collect(A)
    story.add(kinds.UPDATE_REFUSED, number=1, site=B)
    assert due(story) == [Close(1, (A,), (B,))]


def test_a_round_of_refused_updates_stays_open_while_another_may_come() -> None:
    story = Story().start(A, B).contribute(A)
    story.add(kinds.UPDATE_REFUSED, number=1, site=A)
    assert due(story, later=1e6) == []


def test_a_round_of_which_every_update_is_refused_ends_the_run_instead_of_starving_it() -> None:
    story = Story().start(A, B).contribute(A, B)
    for site in (A, B):
        story.add(kinds.UPDATE_REFUSED, number=1, site=site, reason="damaged")
    why = "every update of round 1 was refused; this one: damaged"
    assert due(story) == [GiveUp(A, why), GiveUp(B, why)]


def test_a_closed_round_goes_to_every_island_that_is_not_done() -> None:
    story = Story().start(A, B).contribute(A, B).collect(A, B).close(A, B)
    assert due(story) == [Deliver(1, A), Deliver(1, B)]
    story.add(kinds.ROUND_DELIVERED, number=1, site=A)
    assert due(story) == [Deliver(1, B)]
    assert due(story.end(B).settle(B)) == []


def test_rounds_missed_by_an_island_are_delivered_in_order() -> None:
    story = Story().start(A).intend(B).job(B, "pending")
    for number in (1, 2):
        story.contribute(A, number=number).collect(A, number=number).close(A)
    story.add(kinds.ROUND_DELIVERED, number=1, site=A)
    assert due(story) == [Deliver(1, B), Deliver(2, A), Deliver(2, B)]


def test_rounds_close_one_after_the_other() -> None:
    story = Story().start(A, B).contribute(A, B).contribute(A, B, number=2)
    assert due(story) == [Collect(1, A), Collect(1, B)]
    story.collect(A, B).close(A, B)
    assert [a for a in due(story) if not isinstance(a, Deliver)] == [Collect(2, A), Collect(2, B)]


def test_a_late_update_of_a_closed_round_is_left_where_it_is() -> None:
    story = Story().start(A, B).contribute(A).collect(A).close(A, missing=(B,)).contribute(B)
    assert due(story) == [Deliver(1, A), Deliver(1, B)]


def test_an_update_that_nobody_is_left_to_apply_keeps_no_run_open() -> None:
    """Its site may be out of reach for ever: then the update could never be collected."""
    story = Story().start(A, B).contribute(A).end(A).settle(A).end(B).settle(B)
    assert due(story) == [End("completed", "all islands trained all their steps")]


def test_a_run_without_rounds_exchanges_nothing() -> None:
    assert due(Story(rounds=None).start(A, B).contribute(A)) == []


def test_sites_of_a_round_stand_in_the_order_of_their_names() -> None:
    """Islands apply updates in this order (law 7), whatever the order of the plan or of arrival."""
    islands = plan()["islands"]
    story = Story(islands=[{**islands[0], "site": site} for site in ("d", "b", "c", "a")])
    story.start("d", "b", "c", "a").contribute("d", "b").collect("d", "b")
    assert due_alike(story, later=DEADLINE) == [Close(1, ("b", "d"), ("a", "c"))]
    story.contribute("c", "a")
    assert due_alike(story)[:2] == [Collect(1, "a"), Collect(1, "c")]


# ---- decisions are a pure function


def test_the_same_state_gives_the_same_actions_and_stays_as_it_is() -> None:
    story = Story().start(A, B).contribute(A, B).collect(A, B).close(A, B).contribute(A, number=2)
    state, facts = story.state, Facts(story.clock, {}, {A: LAG, B: LAG})
    before = copy.deepcopy(state)
    assert decide(state, facts) == decide(state, facts)
    assert state == before
