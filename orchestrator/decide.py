"""What the coordinator should do next: a pure function of what is known. Acting is campaign.py's part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from orchestrator.admission import LIMITS_LAST_SECONDS, Place, admit, earliest_start, must_drain, windows
from orchestrator.chain import enough_queued, why_stuck
from orchestrator.choices import (
    Action,
    Cancel,
    Close,
    Collect,
    Deliver,
    Drain,
    End,
    Exclude,
    GiveUp,
    Hold,
    Intend,
    Learn,
    Release,
    Settle,
    Submit,
)
from orchestrator.state import IslandState, RunState, SegmentState


@dataclass(frozen=True)
class Facts:
    """What the coordinator knows beside the events."""

    now: float
    absent: Mapping[str, float]  # keys that their site denies: seconds from its first such answer to its last
    lag: Mapping[str, float]  # site -> seconds that an "absent" must have lasted to be believed (law 2)
    ahead: Mapping[str, int] = field(default_factory=dict)  # site -> segments to keep queued behind another
    exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # site -> nodes to keep away from
    places: Mapping[str, Place] = field(default_factory=dict)  # by site
    limits_age: Mapping[str, float] = field(default_factory=dict)  # site -> seconds since it told its limits


def decide(state: RunState, facts: Facts) -> list[Action]:
    """Actions that are due, most urgent first; the same state and facts give the same actions."""
    if state.outcome is not None:
        return []
    actions: list[Action] = []
    if not state.stop_requested:
        actions += _rounds(state, facts)
    for island in state.islands.values():
        actions += _island(state, island, facts)
    return actions or _end(state)


def _island(state: RunState, island: IslandState, facts: Facts) -> list[Action]:
    stopping, stuck = state.stop_requested, why_stuck(island, state.plan_of(island.site))
    wanted = not (stopping or island.done or stuck)
    actions: list[Action] = []
    plan = state.plan_of(island.site)
    closures = windows(island.limits, facts.places.get(island.site, Place()))
    for segment in island.segments:
        draining = stopping or must_drain(segment, plan, closures, facts.now)
        actions += _segment(segment, facts, stopping=draining, wanted=wanted)
    if stopping or island.done:
        return actions
    waiting = [s for s in island.segments if not s.over]
    if waiting:
        return actions if stuck else actions + _queue_ahead(state, island, waiting, facts)
    if stuck:
        actions.append(GiveUp(island.site, stuck))
    else:
        actions += _next(state, island, [], facts)
    return actions


def _next(state: RunState, island: IslandState, waiting: list[SegmentState], facts: Facts) -> list[Action]:
    """The chain's next segment, as its site lets it run."""
    site, plan = island.site, state.plan_of(island.site)
    place = facts.places.get(site, Place())
    if place.queues and facts.limits_age.get(site, math.inf) > LIMITS_LAST_SECONDS:
        return [Learn(site)]
    start = earliest_start(waiting, plan, facts.now)
    found = admit(plan, island.limits, place, start=start, there=len(waiting))
    if found.never:
        return [GiveUp(site, found.never)] if not waiting else []
    if found.wait:
        return [] if found.wait == island.held else [Hold(site, found.wait)]
    limit = 0.0 if found.time_limit == plan["time_limit_seconds"] else found.time_limit
    after = waiting[-1].key if waiting else ""
    return [Intend(site, len(island.segments), after, limit, found.begin, found.reason)]


def _queue_ahead(
    state: RunState, island: IslandState, waiting: list[SegmentState], facts: Facts
) -> list[Action]:
    """The chain's next segment, queued while the one before runs: the run survives an absent operator."""
    last = waiting[-1]
    if len(waiting) > facts.ahead.get(island.site, 0) or not last.live:
        return []
    if enough_queued(island, waiting, state.plan_of(island.site), facts.now):
        return []
    return _next(state, island, waiting, facts)


def _segment(segment: SegmentState, facts: Facts, *, stopping: bool, wanted: bool) -> list[Action]:
    """What a segment needs. Unknown does nothing: only an answer of its site moves it (law 2)."""
    if segment.over:
        return []
    if segment.job["state"] == "ended":
        return [Settle(segment.site, segment.key)]
    if segment.job["state"] == "pending" and not wanted:
        return [Cancel(segment.site, segment.key)]
    if segment.job["state"] == "pending" and segment.excludes != (nodes := _kept_away(segment, facts)):
        return [Exclude(segment.site, segment.key, nodes)]
    if segment.live:
        return [Drain(segment.site, segment.key)] if stopping else []
    if facts.absent.get(segment.key, -1.0) < facts.lag[segment.site]:
        return []
    action = Submit if wanted else Release
    return [action(segment.site, segment.key)]


def _kept_away(segment: SegmentState, facts: Facts) -> tuple[str, ...]:
    """Where a site has no nodes to choose from nothing is ever excluded."""
    return facts.exclude.get(segment.site, segment.excludes)


def _rounds(state: RunState, facts: Facts) -> list[Action]:
    actions: list[Action] = [
        Deliver(closed.number, site)
        for closed in state.closed
        for site, island in state.islands.items()
        if (closed.number, site) not in state.delivered and not island.done
    ]
    if not state.plan["rounds"] or all(island.done for island in state.islands.values()):
        return actions  # an update that nobody is left to apply keeps no run open
    number = len(state.closed) + 1
    told = {s: i.contributions[number] for s, i in state.islands.items() if number in i.contributions}
    usable = sorted(s for s in told if (number, s) not in state.refused)
    actions += [Collect(number, site) for site in usable if (number, site) not in state.collected]
    missing = sorted(s for s, island in state.islands.items() if s not in told and _at_work(island))
    if not usable:
        return actions + ([] if missing else _give_up_all(state, number, told))
    waited = facts.now - min(told[s]["received"] for s in usable)
    ready = tuple(s for s in usable if (number, s) in state.collected)
    if ready and ((ready == tuple(usable) and not missing) or waited >= _deadline(state)):
        without = sorted({*missing, *told} - {*ready})
        actions.append(Close(number, ready, tuple(without)))
    return actions


def _give_up_all(state: RunState, number: int, told: Iterable[str]) -> list[Action]:
    """No update of the open round can be used, and none will come: islands would starve again and again."""
    alike = f"every update of round {number} was refused; this one: "
    left = [site for site in told if not state.islands[site].done]
    return [GiveUp(site, alike + state.refused[number, site]) for site in left]


def _at_work(island: IslandState) -> bool:
    """Whether an update may come soon: a queued island keeps nobody waiting."""
    return not island.done and any(s.job["state"] == "running" for s in island.segments)


def _deadline(state: RunState) -> float:
    """Seconds from the first update until a round closes without the rest.

    Half of what an island waits (`deadline_seconds`), so that the closed round reaches it in time.
    """
    return float(state.plan["rounds"]["deadline_seconds"]) / 2


def _end(state: RunState) -> list[Action]:
    if any(not s.over for i in state.islands.values() for s in i.segments):
        return []
    if not state.stop_requested and not all(island.done for island in state.islands.values()):
        return []  # a site lets nothing more be submitted now
    if all(island.completed for island in state.islands.values()):
        return [End("completed", "all islands trained all their steps")]
    if state.stop_requested:
        return [End("stopped", "an operator asked for it")]
    lost = {s: i.given_up for s, i in state.islands.items() if i.given_up}
    return [End("failed", "; ".join(f"{s}: {why}" for s, why in lost.items()))]
