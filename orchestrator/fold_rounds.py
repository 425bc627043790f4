"""How the events of rounds change what is known of a run: part of orchestrator/fold.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clusters.rounds import ClosedRound
from orchestrator.state import Event, IslandState, RunState


def round_closed(state: RunState, event: Event) -> None:
    closed = ClosedRound.from_json(event.facts["manifest"])
    assert closed.number == len(state.closed) + 1, "rounds close in order, once"
    assert closed.base == state.base, "each round is based on the one before"
    state.closed.append(closed)
    state.closed_without[closed.number] = list(event.facts["missing"])
    state.drift = event.facts.get("drift") or state.drift
    if state.drift and event.facts.get("drift_exceeded") and closed.reset_from:  # else a reset is under way
        state.alerts.append(_apart(closed, state.drift))


def _apart(closed: ClosedRound, drift: Mapping[str, Any]) -> str:
    who, far = " and ".join(drift["sites"]), f"{drift['value']:.1e} apart in {drift['tensor']}"
    return f"round {closed.number}: the bases of {who} are {far}; all take that of {closed.reset_from} next"


def round_delivered(state: RunState, event: Event) -> None:
    state.delivered.add((event.facts["number"], event.facts["site"]))
    state.bytes_exchanged += event.facts["bytes"]


def update_collected(state: RunState, event: Event) -> None:
    which = (event.facts["number"], event.facts["site"])
    state.collected.add(which)
    if "norm" in event.facts:
        state.norms[which] = event.facts["norm"]
    state.bytes_exchanged += event.facts["bytes"]


def update_refused(state: RunState, event: Event) -> None:
    which = (event.facts["number"], event.facts["site"])
    state.refused[which] = event.facts["reason"]
    if event.facts.get("discarded"):
        state.discarded.add(which)
    state.alerts.append(f"update of round {event.facts['number']} refused: {event.facts['reason']}")


def contributed(island: IslandState, event: Event) -> None:
    # A restarted island tells of the same update again; the first telling counts.
    island.contributions.setdefault(event.facts["round"], {**event.facts, "received": event.received})
    island.activity = f"waiting for round {event.facts['round']}"


def round_applied(island: IslandState, event: Event) -> None:
    island.applied_round = event.facts["round"]
    island.waited_seconds += event.facts["waited_seconds"]
    island.activity = "training"


def round_open(island: IslandState, event: Event) -> None:
    island.waited_seconds += event.facts["waited_seconds"]
    island.activity = f"training, round {event.facts['round']} open"
