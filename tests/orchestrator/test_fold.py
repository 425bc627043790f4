"""Each event changes what is known of a run in one way, and telling it twice changes nothing more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clusters import events as site_kinds
from clusters.rounds import ClosedRound, Contribution, genesis
from orchestrator import kinds
from orchestrator.fold import fold
from orchestrator.state import IslandState, waits_for
from tests.orchestrator.story import BATCH_TOKENS, CREATED, FACTS, RUN, A, B, Story, key


def island(story: Story, site: str = A) -> IslandState:
    return story.state.islands[site]


# ---- the run


def test_a_run_begins_with_the_islands_of_its_plan() -> None:
    state = Story().state
    assert state.created == CREATED
    assert [(i.site, i.layout["tp"], i.layout["pp"]) for i in state.islands.values()] == [
        (A, 2, 1),
        (B, 1, 2),
    ]
    assert state.plan_of(B)["allocation"] == "demo-b"
    assert (state.outcome, state.base) == (None, genesis(RUN))
    assert {i.activity for i in state.islands.values()} == {"waiting for its first segment"}


def test_unknown_kinds_change_nothing() -> None:
    story = Story().start(A)
    before = story.state
    story.add("weather.changed", site="nowhere")
    story.add(site_kinds.GARBLED, at=A, text="{")
    assert story.state == before


@pytest.mark.parametrize("kind", sorted(FACTS))
def test_every_kind_can_be_taken_in(kind: str) -> None:
    story = Story().start(A)
    story.add(kind, at=A if kind in vars(site_kinds).values() else "")
    assert fold(RUN, story.events).run == RUN


def test_a_site_cannot_speak_for_the_controller() -> None:
    story = Story().start(A)
    before = story.state
    for kind in (kinds.STOP_REQUESTED, kinds.RUN_ENDED, kinds.ISLAND_GIVEN_UP, kinds.SEGMENT_SETTLED):
        story.add(kind, at=A, outcome="stopped", reason="forged", amount=0)
    assert story.state == before


def test_a_site_that_talks_nonsense_is_named_and_stops_nobody() -> None:
    story = Story().start(A)
    story.events.append(replace(story.add(site_kinds.STEP, at=A), facts={"step": "nine"}))
    state = story.state
    assert state.outcome is None
    assert "an event 'step' that cannot be understood: KeyError('loss')" in state.alerts[0]


def test_the_end_of_a_run_and_its_resumption() -> None:
    story = Story().start(A)
    story.add(kinds.STOP_REQUESTED)
    assert story.state.stop_requested
    story.add(kinds.ISLAND_GIVEN_UP, site=A, reason="no units")
    ended = story.add(kinds.RUN_ENDED, outcome="stopped", reason="asked")
    state = story.state
    assert (state.outcome, state.reason, state.ended) == ("stopped", "asked", ended.time)
    assert state.islands[A].done
    story.add(kinds.RUN_RESUMED)
    state = story.state
    assert (state.outcome, state.reason, state.ended, state.stop_requested) == (None, "", None, False)
    assert not state.islands[A].done


def test_alerts_and_faults_are_kept() -> None:
    story = Story()
    story.add(kinds.ALERT)
    story.add(kinds.FAULT_INJECTED)
    story.add(kinds.UPDATE_REFUSED)
    assert story.state.alerts == ["beware", "update of round 1 refused: damaged"]
    assert story.state.faults == [{"what": "rank 1 killed", "proof": "signal 9"}]
    assert story.state.refused == {(1, A): "damaged"}


# ---- rounds


def test_a_contribution_told_again_counts_as_it_was_told_first() -> None:
    story = Story().start(A).contribute(A, sha256="first")
    received = story.clock
    story.contribute(A, sha256="second", tokens=7)
    assert island(story).contributions == {
        1: {**FACTS[site_kinds.ROUND_CONTRIBUTED], "sha256": "first", "received": received}
    }
    assert island(story).activity == "waiting for round 1"


def test_closed_rounds_are_a_chain() -> None:
    story = Story().start(A, B).contribute(A, B).close(A, B)
    first = ClosedRound(
        RUN, 1, genesis(RUN), (Contribution(A, 1280, "ab" * 32), Contribution(B, 1280, "ab" * 32))
    )
    assert story.state.closed == [first]
    assert story.state.base == first.identity
    story.contribute(A, number=2).close(A, missing=(B,))
    assert story.state.closed[1].base == first.identity
    assert story.state.closed_without == {1: [], 2: [B]}


@pytest.mark.parametrize(("number", "base"), [(2, genesis(RUN)), (1, "0" * 64)])
def test_a_round_out_of_its_chain_is_a_bug(number: int, base: str) -> None:
    story = Story()
    story.add(kinds.ROUND_CLOSED, manifest=ClosedRound(RUN, number, base, ()).to_json(), missing=[])
    with pytest.raises(AssertionError):
        _ = story.state


def test_bytes_are_counted_both_ways() -> None:
    story = Story().collect(A, B)
    story.add(kinds.ROUND_DELIVERED)
    assert story.state.bytes_exchanged == 500 + 500 + 700
    assert story.state.collected == {(1, A), (1, B)}
    assert story.state.delivered == {(1, A)}


def test_waiting_for_rounds_adds_up() -> None:
    story = Story().start(A)
    story.add(site_kinds.ROUND_OPEN, at=A, round=1)
    assert island(story).activity == "training, round 1 open"
    assert island(story).applied_round == 0
    assert island(story.train(A, 11, 11)).activity == "training"
    story.add(site_kinds.ROUND_APPLIED, at=A, round=2)
    assert (island(story).waited_seconds, island(story).applied_round) == (122.0, 2)
    assert island(story).activity == "training"


# ---- segments


def test_a_segment_intended_twice_is_one_segment() -> None:
    story = Story().intend(A).intend(A).intend(A, sequence=1)
    assert [(s.key, s.sequence, s.reserved) for s in island(story).segments] == [
        (key(A, 0), 0, 1_000_000),
        (key(A, 1), 1, 1_000_000),
    ]


def test_a_segment_from_its_intention_to_its_settlement() -> None:
    story = Story().intend(A)
    assert island(story).activity == "submitting"
    assert (story.state.segment(key(A)).live, story.state.segment(key(A)).over) == (False, False)
    story.job(A, "pending")
    assert island(story).activity == "queued"
    assert story.state.segment(key(A)).live
    story.job(A, "running")
    story.add(site_kinds.SEGMENT_CLAIMED, at=A)
    assert island(story).activity == "starting Ray"
    story.add(site_kinds.RUNTIME_READY, at=A)
    assert island(story).activity == "starting ranks"
    story.add(site_kinds.RANKS_STARTED, at=A)
    assert (island(story).activity, island(story).ranks) == ("building the model", {0: 81, 1: 82})
    story.add(site_kinds.SEGMENT_DRAINING, at=A)
    assert island(story).activity == "draining: time limit"
    story.add(site_kinds.SEGMENT_ENDED, at=A, outcome="drained", reason="time limit")
    story.job(A, "ended", outcome="failed")
    segment = story.state.segment(key(A))
    assert (segment.live, segment.over, segment.outcome) == (False, False, "drained")
    assert segment.job["outcome"] == "failed"
    assert not {"site", "key"} & segment.job.keys()
    assert (island(story).activity, island(story).ranks) == ("segment 0 ended: drained", {})
    story.settle(A, amount=777)
    assert story.state.segment(key(A)).over
    assert island(story).settled == 777


def test_a_job_that_dies_without_a_word_ends_with_what_its_site_says() -> None:
    story = Story().start(A).job(A, "ended", outcome="failed")
    assert island(story).activity == "segment 0 ended: failed"


def test_a_released_segment_is_over_and_costs_nothing() -> None:
    story = Story().intend(A)
    story.add(kinds.SEGMENT_RELEASED)
    assert story.state.segment(key(A)).over
    assert island(story).settled == 0


def test_settlements_add_up_over_the_chain() -> None:
    story = Story().start(A).end(A).settle(A).start(A, sequence=1).end(A, 1).settle(A, 1, amount=5)
    assert island(story).settled == 250_005


def test_only_the_word_completed_completes_an_island() -> None:
    story = Story().start(A, B)
    story.add(site_kinds.TRAINING_ENDED, at=A, outcome="drained")
    story.add(site_kinds.TRAINING_ENDED, at=B, outcome="completed")
    assert (island(story, A).completed, island(story, B).completed) == (False, True)
    assert (island(story, A).activity, island(story, B).activity) == ("drained", "completed")
    story.job(B, "ended")
    assert island(story, B).activity == "completed"


def test_giving_up_tells_why() -> None:
    story = Story()
    story.add(kinds.ISLAND_GIVEN_UP, site=B, reason="no units")
    assert (island(story, B).given_up, island(story, B).activity) == ("no units", "given up: no units")


# ---- training


def test_steps_tell_loss_tokens_and_rates() -> None:
    story = Story().start(A).train(A, 1, 4, seconds=0.5)
    now = island(story)
    assert (now.step, now.loss_first, now.loss, now.tokens) == (4, 6.9, 6.6, 4 * BATCH_TOKENS)
    assert (now.grad_norm, now.learning_rate) == (1.25, 1e-3)
    assert now.tokens_per_second == BATCH_TOKENS / 0.5
    assert now.mean_tokens_per_second == pytest.approx(4 * BATCH_TOKENS / 3.5)  # a second from end to end
    assert now.trained_seconds == 2.0


def test_the_rate_is_that_of_the_last_twenty_steps() -> None:
    story = Story().start(A).train(A, 1, 5, seconds=100.0).train(A, 6, 25, seconds=0.25)
    assert island(story).tokens_per_second == BATCH_TOKENS / 0.25


def test_no_rate_before_the_first_step() -> None:
    now = island(Story().start(A))
    assert (now.tokens_per_second, now.mean_tokens_per_second, now.loss) == (None, 0.0, None)


def test_a_restart_that_repeats_steps_counts_no_token_twice() -> None:
    story = Story().start(A).train(A, 1, 9)
    story.add(site_kinds.RANK_DIED, at=A)
    story.add(site_kinds.TRAINING_READY, at=A, generation=1, step=5)
    assert (island(story).step, island(story).activity) == (5, "training")
    story.train(A, 6, 10)
    assert island(story).tokens == 10 * BATCH_TOKENS
    assert island(story).trained_seconds == 14 * 0.5
    assert island(story).loss_first == 6.9


def test_checkpoints_belong_to_their_segment() -> None:
    story = Story().start(A)
    story.add(site_kinds.CHECKPOINT_SAVED, at=A, step=5)
    story.end(A, outcome="drained").settle(A).start(A, sequence=1)
    story.add(site_kinds.CHECKPOINT_SAVED, at=A, segment=1, step=10)
    story.add(site_kinds.CHECKPOINT_SAVED, at=A, segment=1, step=15)
    assert [s.checkpoints for s in island(story).segments] == [1, 2]
    assert island(story).checkpoint_step == 15


# ---- recovery


def test_recovery_lasts_from_a_death_to_the_next_completed_step() -> None:
    story = Story().start(A).train(A, 1, 3)
    died = story.add(site_kinds.RANK_DIED, at=A).time
    assert island(story).activity == "replacing its ranks: rank 1 died"
    assert island(story).ranks == {}
    story.add(site_kinds.RANKS_STARTED, at=A, generation=1)
    story.add(site_kinds.TRAINING_READY, at=A, generation=1)
    story.train(A, 1, 2)
    assert island(story).recoveries == [story.clock - 1 - died]
    assert island(story).restarts == 1


def test_peers_that_follow_a_dead_rank_are_the_same_restart() -> None:
    story = Story().start(A).train(A, 1, 3)
    died = story.add(site_kinds.RANK_DIED, at=A, rank=1).time
    story.add(site_kinds.RANK_DIED, at=A, rank=0, exit_code=1, signal=None)
    assert island(story).activity == "replacing its ranks: rank 1 died"
    story.add(site_kinds.RANKS_STARTED, at=A, generation=2)
    story.train(A, 1, 1)
    assert (island(story).restarts, island(story).recoveries) == (1, [story.clock - died])


def test_a_death_before_the_next_step_prolongs_the_recovery() -> None:
    story = Story().start(A).train(A, 1, 1)
    died = story.add(site_kinds.RANK_DIED, at=A).time
    story.add(site_kinds.RANKS_STARTED, at=A, generation=2)
    story.add(site_kinds.RANK_DIED, at=A, generation=2)
    story.add(site_kinds.RANKS_STARTED, at=A, generation=3)
    story.train(A, 1, 1)
    assert (island(story).restarts, island(story).recoveries) == (2, [story.clock - died])


def test_a_step_from_before_the_death_that_is_heard_after_it_is_no_recovery() -> None:
    """Streams are read one after the other: the supervisor's may be ahead of the ranks'."""
    story = Story().start(A).train(A, 1, 3)
    before = story.clock + 0.5
    died = story.add(site_kinds.RANK_DIED, at=A).time
    story.add(site_kinds.STEP, at=A, step=4, time=before)
    assert island(story).recoveries == []
    story.train(A, 1, 1)
    assert island(story).recoveries == [story.clock - died]


def test_ranks_replaced_though_none_died_are_a_restart() -> None:
    """A rank that hangs kills nobody; its supervisor replaces them all."""
    story = Story().start(A)
    story.add(site_kinds.RANKS_STARTED, at=A, generation=2)
    assert island(story).restarts == 1
    story.end(A, outcome="failed").settle(A).start(A, sequence=1)
    assert island(story).restarts == 1


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        ("pending", "PartitionTimeLimit", "PartitionTimeLimit"),
        ("pending", "QOSMaxJobsPerUserLimit", "QOSMaxJobsPerUserLimit"),
        ("pending", "Priority", ""),
        ("pending", None, ""),
        ("running", "PartitionTimeLimit", ""),
    ],
)
def test_only_what_somebody_may_have_to_change_is_a_reason(state: str, reason: str | None, told: str) -> None:
    assert waits_for({"state": state, "reason": reason}) == told
    story = Story().intend(A).job(A, state, reason=reason)
    if state == "pending":
        assert story.state.islands[A].activity == (f"queued: {told}" if told else "queued")
