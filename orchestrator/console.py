"""Coordinates a run in the foreground: progress on the terminal, Ctrl-C as a request to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from clusters import events as site_kinds
from orchestrator import kinds, lease, summary, views
from orchestrator.campaign import Listener
from orchestrator.desk import Desk
from orchestrator.plan import Plan
from orchestrator.state import Event, RunState, waits_for

_EVERY_STEPS = 10  # progress lines per island
_STOP_POLL_SECONDS = 1.0
_WIDTH = 120  # columns, where there is no terminal to ask


def show_plan(plan: Plan) -> None:
    """What is about to be reserved and started."""
    _print(views.plan_table(plan.to_json()))


def _print(drawn: Table) -> None:
    """Off a terminal a table keeps its columns."""
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(drawn)


def coordinate(desk: Desk, run: str, also: Listener | None = None) -> int:
    """Coordinate until the run ends; the exit code of the command: 0 completed or stopped, 1 otherwise."""
    return _coordinate(desk, run, _lease(desk, run), also)


def resume(desk: Desk, run: str) -> int:
    """Take a run up again where its log ends."""
    if desk.state(run).outcome == "completed":
        click.echo(f"{run} has completed; its summary: {desk.home.run(run).summary}")
        return 0
    held = _lease(desk, run)
    desk.store.record(run, kinds.RUN_RESUMED, holder=held.holder)
    return _coordinate(desk, run, held, None)


def stop(desk: Desk, run: str) -> int:
    """Ask for the end; a coordinator at work hears it, otherwise this process does its part."""
    state = desk.state(run)
    if state.outcome is None:
        desk.store.record(run, kinds.STOP_REQUESTED)
        click.echo(f"{run}: its islands checkpoint and exit")
    while desk.state(run).outcome is None:
        if lease.free(desk.store, run):
            return coordinate(desk, run)
        time.sleep(_STOP_POLL_SECONDS)
    state = desk.state(run)
    click.echo(f"{run} has ended: {state.outcome}, {state.reason}")
    return 0


def _lease(desk: Desk, run: str) -> lease.Lease:
    try:
        return lease.acquire(desk.store, run, lambda who: click.echo(f"waiting for {who} to let go of {run}"))
    except lease.LeaseLost as error:
        raise ValueError(str(error)) from None


def _coordinate(desk: Desk, run: str, held: lease.Lease, also: Listener | None) -> int:
    say = Progress()

    def listen(event: Event, state: RunState) -> None:
        say(event, state)
        if also:
            also(event, state)

    try:
        campaign = desk.campaign(run, listen)
        with _ctrl_c(campaign.request_stop):
            state = campaign.until_the_end(held)
    except lease.LeaseLost as error:
        click.echo(f"eurotrain: {error}", err=True)
        return 1
    finally:
        held.release()
    _print(summary.table(summary.summarise(state)))
    click.echo(f"{state.outcome}: {state.reason}")
    click.echo(f"summary: {desk.home.run(run).summary}")
    return 0 if state.outcome in ("completed", "stopped") else 1


class Progress:
    """Tells what happens, a line each; training steps every few."""

    def __init__(self, echo: Callable[[str], None] = click.echo) -> None:
        self._echo = echo

    def __call__(self, event: Event, state: RunState) -> None:
        text = self._line(event, state)
        if text:
            who = event.site or event.facts.get("site") or "run"
            self._echo(f"{event.time - state.created:7.1f}s  {who:<10}  {text}")

    def _line(self, event: Event, state: RunState) -> str | None:
        facts = event.facts
        if event.kind == site_kinds.STEP:
            return self._step(event, state)
        if event.kind == kinds.ROUND_CLOSED:
            return _closed(state, facts["missing"])
        if event.kind == kinds.ROUND_DELIVERED:
            return None
        form = _LINES.get(event.kind)
        return form(dict(facts)) if form else None

    def _step(self, event: Event, state: RunState) -> str | None:
        facts = event.facts
        if facts["step"] % _EVERY_STEPS and facts["step"] != 1:
            return None
        steps = state.plan_of(event.site)["steps"]
        rate = facts["tokens"] / facts["seconds"]
        return f"step {facts['step']}/{steps}  loss {facts['loss']:.4f}  {rate:,.0f} tokens/s"


def _closed(state: RunState, missing: list[str]) -> str:
    closed = state.closed[-1]
    without = f" without {', '.join(missing)}" if missing else ""
    reset = f"; in the next all take the base of {closed.reset_from}" if closed.reset_from else ""
    return f"round {closed.number} closed{without}{reset}"


def _signal(facts: dict[str, Any]) -> str:
    number = facts.get("signal")
    return f"signal {number}" if number else f"exit code {facts.get('exit_code')}"


def _job(facts: dict[str, Any]) -> str:
    more = facts.get("outcome") or waits_for(facts)
    return f"job {facts['job_id']} {facts['state']}" + (f": {more}" if more else "")


def _because(facts: dict[str, Any]) -> str:
    return f"; {facts['reason']}" if facts.get("reason") else ""


def _ready(facts: dict[str, Any]) -> str:
    origin = f"checkpoint {Path(facts['checkpoint']).name}" if facts["checkpoint"] else "fresh weights"
    return f"training from step {facts['step']}, {origin}"


def _ended(facts: dict[str, Any]) -> str:
    return f"segment ended: {facts['outcome']}" + (f", {facts['reason']}" if facts.get("reason") else "")


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    kinds.SEGMENT_INTENDED: lambda f: f"segment {f['key']}: units reserved" + _because(f),
    kinds.SUBMISSION_HELD: lambda f: f"the next segment waits: {f['reason']}",
    kinds.JOB_OBSERVED: _job,
    kinds.SEGMENT_SETTLED: lambda f: f"segment {f['key']} settled: {f['amount'] / 1e6:.4f} units",
    kinds.NODES_EXCLUDED: lambda f: (
        f"segment {f['key']} keeps away from {', '.join(f['nodes']) or 'no node'}"
    ),
    kinds.NODE_TRUSTED: lambda f: f"{f['node']} may be used again: an operator says so",
    site_kinds.NODE_LOST: lambda f: f"lost node {f['host']}: {f['reason']}",
    kinds.ISLAND_GIVEN_UP: lambda f: f"given up: {f['reason']}",
    kinds.UPDATE_REFUSED: lambda f: f"update of round {f['number']} refused: {f['reason']}",
    kinds.STOP_REQUESTED: lambda _: "stopping: islands checkpoint and exit (Ctrl-C again leaves them to it)",
    kinds.FAULT_INJECTED: lambda f: f"fault injected: {f['what']}",
    kinds.ALERT: lambda f: f"warning: {f['text']}",
    site_kinds.RUNTIME_READY: lambda f: f"Ray and imports ready after {f['seconds']:.1f} s",
    site_kinds.RANKS_STARTED: lambda f: f"ranks started, generation {f['generation']}: pids {f['pids']}",
    site_kinds.TRAINING_READY: _ready,
    site_kinds.RANK_DIED: lambda f: f"rank {f['rank']} (pid {f['pid']}) died: {_signal(f)}",
    site_kinds.CHECKPOINT_SAVED: lambda f: f"checkpoint of step {f['step']}: {f['bytes'] / 1e6:.1f} MB",
    site_kinds.CHECKPOINT_FAILED: lambda f: f"checkpoint of step {f['step']} not saved: {f['reason']}",
    site_kinds.CHECKPOINT_DAMAGED: lambda f: f"checkpoint damaged, another is used: {f['reason']}",
    site_kinds.ROUND_APPLIED: lambda f: f"round {f['round']} applied, update norm {f['update_norm']:.4f}",
    site_kinds.ROUND_OPEN: lambda f: f"round {f['round']} not closed in time: training goes on",
    site_kinds.SEGMENT_DRAINING: lambda f: f"draining: {f['reason']}",
    site_kinds.TRAINING_ENDED: lambda f: f"training {f['outcome']} at step {f['step']}",
    site_kinds.SEGMENT_ENDED: _ended,
}


@contextlib.contextmanager
def _ctrl_c(request_stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C asks for a stop; the second leaves the islands to themselves."""
    asked = False

    def handle(_signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            click.echo(
                "left running: eurotrain resume takes them up again, eurotrain stop ends them", err=True
            )
            os._exit(130)  # threads may still wait for a site's answer
        asked = True
        request_stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
