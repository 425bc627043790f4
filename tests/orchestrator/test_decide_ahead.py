"""Chains submitted ahead: the next segment waits in the queue, and leaves it when it is not needed."""

from __future__ import annotations

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.choices import Action, Cancel, Drain, GiveUp, Intend
from orchestrator.decide import Facts, decide
from tests.orchestrator.story import A, B, Story, key, plan

LONG = 30 * 60 - 60.0  # what a segment of the story trains at most, in seconds


def due(story: Story, *, later: float = 0.0, ahead: int = 1) -> list[Action]:
    """What is due for the first island, the other having done its part."""
    return decide(story.state, Facts(story.clock + later, {}, {A: 5.0, B: 5.0}, {A: ahead}))


def training(seconds: float, sequence: int = 0) -> Story:
    """One island at work, ten steps done, each taking so long."""
    story = Story(rounds=None).start(B).end(B).settle(B).start(A, sequence=sequence)
    return story.train(A, 1, 10, seconds=seconds)


def test_the_next_segment_is_queued_behind_the_one_that_will_not_suffice() -> None:
    assert due(training(seconds=LONG / 20)) == [Intend(A, 1, after=key(A))]


def test_nothing_is_queued_when_the_running_segment_will_suffice() -> None:
    assert due(training(seconds=1.0)) == []


def test_a_segment_that_has_run_long_suffices_no_more() -> None:
    story = training(seconds=30.0)  # 30 steps are left: 900 s
    assert due(story) == []
    assert due(story, later=LONG - 600.0) == [Intend(A, 1, after=key(A))]


def test_sites_that_do_not_queue_ahead_get_one_segment_at_a_time() -> None:
    assert due(training(seconds=LONG), ahead=0) == []


def test_no_more_are_queued_than_the_site_is_to_have() -> None:
    story = training(seconds=LONG).intend(A, sequence=1).job(A, "pending", 1)
    assert due(story, ahead=1) == []
    assert due(story, ahead=2) == [Intend(A, 2, after=key(A, 1))]


def test_nothing_is_queued_behind_a_segment_that_no_site_has_confirmed() -> None:
    assert due(training(seconds=LONG).intend(A, sequence=1), ahead=5) == []


def test_before_the_first_step_the_estimate_decides() -> None:
    changed = [{**island, "estimated_segments": 3} for island in plan()["islands"]]
    story = Story(rounds=None, islands=changed).intend(A, B).job(B, "pending").job(A, "pending")
    assert due(story) == [Intend(A, 1, after=key(A))]
    assert due(Story(rounds=None).intend(A, B).job(B, "pending").job(A, "pending")) == []


def test_a_completed_island_takes_its_queued_segment_back() -> None:
    story = training(seconds=LONG).intend(A, sequence=1).job(A, "pending", 1)
    story.add(site_kinds.TRAINING_ENDED, at=A, outcome="completed")
    assert due(story) == [Cancel(A, key(A, 1))]


def test_a_stop_drains_what_runs_and_cancels_what_waits() -> None:
    story = training(seconds=LONG).intend(A, sequence=1).job(A, "pending", 1)
    story.add(kinds.STOP_REQUESTED)
    assert due(story) == [Drain(A, key(A)), Cancel(A, key(A, 1))]


def test_what_the_site_has_not_confirmed_to_wait_is_not_cancelled() -> None:
    """Law 2: unknown never cancels."""
    story = training(seconds=LONG).intend(A, sequence=1).job(A, "unknown", 1)
    story.add(kinds.STOP_REQUESTED)
    assert due(story) == [Drain(A, key(A))]


def test_an_island_that_trains_is_not_called_queued_because_its_next_segment_is() -> None:
    story = training(seconds=LONG).intend(A, sequence=1).job(A, "pending", 1)
    assert story.state.islands[A].activity == "training"


def fruitless() -> Story:
    """Two segments without a checkpoint, the third in the queue."""
    story = training(seconds=LONG).job(A, "ended").settle(A)
    story.start(A, sequence=1).intend(A, sequence=2).job(A, "pending", 2).job(A, "ended", 1)
    return story.settle(A, 1)


def test_a_chain_that_saves_nothing_takes_its_queued_segment_back() -> None:
    """Law 3: two segments without a new checkpoint stop the chain; the third must not start by itself."""
    story = fruitless()
    assert due(story, ahead=2) == [Cancel(A, key(A, 2))]
    story.job(A, "ended", 2).settle(A, 2, amount=0)
    (action,) = due(story, ahead=2)
    assert isinstance(action, GiveUp)


def test_a_third_segment_that_has_begun_may_still_save_the_chain() -> None:
    story = fruitless().job(A, "running", 2)
    assert due(story, ahead=2) == []
    story.add(site_kinds.CHECKPOINT_SAVED, at=A, segment=2)
    story.job(A, "ended", 2).settle(A, 2)
    assert due(story, ahead=2) == [Intend(A, 3)]
