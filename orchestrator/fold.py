"""How each event changes what is known of a run. Unknown kinds change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from clusters import events as site_kinds
from orchestrator import exclusion, kinds
from orchestrator import fold_rounds as rounds
from orchestrator.state import Event, Evidence, IslandState, RunState, SegmentState, waits_for


def fold(run: str, events: Iterable[Event]) -> RunState:
    """The state of a run after all its events."""
    state = RunState(run)
    for event in events:
        apply(state, event)
    return state


def apply(state: RunState, event: Event) -> None:
    """Take one more event into account. What a site says is believed of that site's island alone."""
    if event.site:
        _of_a_site(state, event)
    elif event.kind in _OF_RUN:
        _OF_RUN[event.kind](state, event)
    elif event.kind in _OF_ISLAND:
        _OF_ISLAND[event.kind](state.islands[event.facts["site"]], event)


def _of_a_site(state: RunState, event: Event) -> None:
    """A line that is not as clusters/events.py says changes nothing, and stops no controller."""
    if event.kind not in _TOLD_BY_SITES:
        return
    try:
        _TOLD_BY_SITES[event.kind](state.islands[event.site], event)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        state.alerts.append(f"{event.site}: an event {event.kind!r} that cannot be understood: {error!r}")


# ---- the controller's own events


def _run_created(state: RunState, event: Event) -> None:
    state.plan, state.created = event.facts["plan"], event.time
    for island in state.plan["islands"]:
        state.islands[island["site"]] = IslandState(island["site"], island["layout"])


def _run_resumed(state: RunState, _: Event) -> None:
    state.stop_requested, state.outcome, state.reason, state.ended = False, None, "", None
    for island in state.islands.values():
        if island.given_up is not None:  # the operator has seen why, and wants another try (law 3)
            island.given_up, island.forgiven = None, len(island.segments)


def _stop_requested(state: RunState, _: Event) -> None:
    state.stop_requested = True


def _run_ended(state: RunState, event: Event) -> None:
    state.outcome, state.reason = event.facts["outcome"], event.facts["reason"]
    state.ended = event.time


def _fault_injected(state: RunState, event: Event) -> None:
    state.faults.append(dict(event.facts))


def _alert(state: RunState, event: Event) -> None:
    state.alerts.append(event.facts["text"])


# ---- what the controller did for an island


def _segment_intended(island: IslandState, event: Event) -> None:
    facts = event.facts
    if facts["key"] in island.by_key:
        return
    if all(s.over for s in island.segments):
        island.activity = "submitting"
    island.held = ""
    known = (facts["key"], island.site, facts["sequence"], facts["reserved"], facts.get("after", ""))
    times = (facts.get("time_limit_seconds", 0.0), facts.get("begin", 0.0))
    segment = island.by_key[facts["key"]] = SegmentState(*known, *times)
    island.segments.append(segment)


def _submission_held(island: IslandState, event: Event) -> None:
    island.held = event.facts["reason"]
    if not any(s.live for s in island.segments):
        island.activity = f"waiting: {island.held}"


def _site_limits(island: IslandState, event: Event) -> None:
    island.limits = dict(event.facts["limits"])


def _segment(island: IslandState, event: Event) -> SegmentState:
    key = event.segment or event.facts["key"]
    return island.by_key[key]


def _segment_released(island: IslandState, event: Event) -> None:
    _segment(island, event).released = True


def _job_observed(island: IslandState, event: Event) -> None:
    segment = _segment(island, event)
    segment.job = {k: v for k, v in event.facts.items() if k not in ("site", "key")}
    island.held = "" if segment.live else island.held
    exclusion.observe_job(island, segment, event.facts, event.received)
    if segment.job["state"] == "pending" and not any(s.job["state"] == "running" for s in island.segments):
        island.activity = f"queued: {why}" if (why := waits_for(segment.job)) else "queued"
    elif segment.job["state"] == "ended" and not island.done:
        island.activity = f"segment {segment.sequence} ended: {segment.outcome or segment.job['outcome']}"
        island.ranks = {}


def _segment_settled(island: IslandState, event: Event) -> None:
    _segment(island, event).settled = event.facts["amount"]


def _nodes_excluded(island: IslandState, event: Event) -> None:
    _segment(island, event).excludes = tuple(event.facts["nodes"])


def _node_trusted(island: IslandState, event: Event) -> None:
    exclusion.trust(island, event.facts["node"])


def _given_up(island: IslandState, event: Event) -> None:
    island.given_up = event.facts["reason"]
    island.activity = f"given up: {island.given_up}"


# ---- what the site tells


def _claimed(island: IslandState, _: Event) -> None:
    island.activity = "starting Ray"


def _runtime_ready(island: IslandState, _: Event) -> None:
    island.activity = "starting ranks"


def _ranks_started(island: IslandState, event: Event) -> None:
    segment = _segment(island, event)
    island.restarts += segment.generations > 0
    segment.generations += 1
    island.ranks = dict(enumerate(event.facts["pids"]))
    island.hosts = dict(enumerate(event.facts["hosts"]))
    island.activity = "building the model"


def _rank_died(island: IslandState, event: Event) -> None:
    facts = event.facts
    if island.ranks:  # its peers may follow the first one, before all are replaced
        island.activity = f"replacing its ranks: rank {facts['rank']} died"
        host = facts.get("host") or island.hosts.get(facts["rank"])
        how = f"signal {facts['signal']}" if facts.get("signal") else f"exit code {facts.get('exit_code')}"
        text = f"rank {facts['rank']}: {facts.get('note') or how}"
        exclusion.observe_death(island, _segment(island, event), host, text, event.received)
    island.ranks = {}
    island.died_at = island.died_at or event.time


def _node_lost(island: IslandState, event: Event) -> None:
    text = f"its supervisor: {event.facts.get('reason') or 'lost'}"
    host = event.facts["host"]
    exclusion.blame(island, Evidence(host, _segment(island, event).key, event.received, text))


def _draining(island: IslandState, event: Event) -> None:
    island.activity = f"draining: {event.facts['reason']}"


def _segment_ended(island: IslandState, event: Event) -> None:
    segment = _segment(island, event)
    segment.outcome, segment.reason = event.facts["outcome"], event.facts.get("reason") or ""
    segment.final = bool(event.facts.get("final"))


def _training_ready(island: IslandState, event: Event) -> None:
    island.step = event.facts["step"]
    island.activity = "training"


def _step(island: IslandState, event: Event) -> None:
    facts = event.facts
    _segment(island, event).trained = True
    island.step, island.loss = facts["step"], facts["loss"]
    island.grad_norm, island.learning_rate = facts["grad_norm"], facts["learning_rate"]
    if island.loss_first is None:
        island.loss_first = facts["loss"]
        island.first_step_began = event.time - facts["seconds"]
    island.tokens = facts["step"] * facts["tokens"]
    island.trained_seconds += facts["seconds"]
    island.last_step_ended = event.time
    island.rates.append((facts["tokens"], facts["seconds"]))
    island.activity = "training"
    # A step of before the death may be heard after it: the ranks' stream is read before the supervisor's.
    if island.died_at is not None and event.time > island.died_at:
        island.recoveries.append(event.time - island.died_at)
        island.died_at = None


def _checkpoint_saved(island: IslandState, event: Event) -> None:
    island.checkpoint_step = event.facts["step"]
    island.deaths = {}
    _segment(island, event).checkpoints += 1


def _training_ended(island: IslandState, event: Event) -> None:
    if event.facts["outcome"] == site_kinds.COMPLETED:
        island.completed = True
    island.activity = event.facts["outcome"]


_OF_RUN: dict[str, Callable[[RunState, Event], None]] = {
    kinds.RUN_CREATED: _run_created,
    kinds.RUN_RESUMED: _run_resumed,
    kinds.STOP_REQUESTED: _stop_requested,
    kinds.RUN_ENDED: _run_ended,
    kinds.ROUND_CLOSED: rounds.round_closed,
    kinds.ROUND_DELIVERED: rounds.round_delivered,
    kinds.UPDATE_COLLECTED: rounds.update_collected,
    kinds.UPDATE_REFUSED: rounds.update_refused,
    kinds.FAULT_INJECTED: _fault_injected,
    kinds.ALERT: _alert,
}

_OF_ISLAND: dict[str, Callable[[IslandState, Event], None]] = {
    kinds.SEGMENT_INTENDED: _segment_intended,
    kinds.SEGMENT_RELEASED: _segment_released,
    kinds.JOB_OBSERVED: _job_observed,
    kinds.SEGMENT_SETTLED: _segment_settled,
    kinds.SUBMISSION_HELD: _submission_held,
    kinds.SITE_LIMITS: _site_limits,
    kinds.NODES_EXCLUDED: _nodes_excluded,
    kinds.NODE_TRUSTED: _node_trusted,
    kinds.ISLAND_GIVEN_UP: _given_up,
}

_TOLD_BY_SITES: dict[str, Callable[[IslandState, Event], None]] = {
    site_kinds.SEGMENT_CLAIMED: _claimed,
    site_kinds.RUNTIME_READY: _runtime_ready,
    site_kinds.RANKS_STARTED: _ranks_started,
    site_kinds.RANK_DIED: _rank_died,
    site_kinds.NODE_LOST: _node_lost,
    site_kinds.SEGMENT_DRAINING: _draining,
    site_kinds.SEGMENT_ENDED: _segment_ended,
    site_kinds.TRAINING_READY: _training_ready,
    site_kinds.STEP: _step,
    site_kinds.CHECKPOINT_SAVED: _checkpoint_saved,
    site_kinds.ROUND_CONTRIBUTED: rounds.contributed,
    site_kinds.ROUND_APPLIED: rounds.round_applied,
    site_kinds.ROUND_OPEN: rounds.round_open,
    site_kinds.TRAINING_ENDED: _training_ended,
}
