"""How the events of rounds change what is known of a run: part of orchestrator/fold.py."""

from __future__ import annotations

from clusters.rounds import ClosedRound
from orchestrator.state import Event, IslandState, RunState


def round_closed(state: RunState, event: Event) -> None:
    closed = ClosedRound.from_json(event.facts["manifest"])
    assert closed.number == len(state.closed) + 1, "rounds close in order, once"
    assert closed.base == state.base, "each round is based on the one before"
    state.closed.append(closed)
    state.closed_without[closed.number] = list(event.facts["missing"])


def round_delivered(state: RunState, event: Event) -> None:
    state.delivered.add((event.facts["number"], event.facts["site"]))
    state.bytes_exchanged += event.facts["bytes"]


def update_collected(state: RunState, event: Event) -> None:
    state.collected.add((event.facts["number"], event.facts["site"]))
    state.bytes_exchanged += event.facts["bytes"]


def update_refused(state: RunState, event: Event) -> None:
    state.refused[event.facts["number"], event.facts["site"]] = event.facts["reason"]
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
