"""Owns one segment inside an allocation: starts its ranks, watches, replaces and drains them.

`python -P -m orchestrator.supervisor SEGMENT_DIR`, under `clusters.guard`. Exit codes: 0 completed, drained
or starved; 1 failed; 3 another incarnation has the segment. SIGTERM and SIGINT drain it. It needs no
controller: it knows its own limits, and tells what happens in events/supervisor.jsonl.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters import events
from clusters.events import EventWriter, read_events
from clusters.guard import STARTED
from clusters.paths import SegmentPaths, claim
from clusters.segment import Segment
from orchestrator.runtime import configure_ray, runtime_directory
from orchestrator.watch import (
    End,
    Verdict,
    bad_input,
    drain_reason,
    judge,
    rank_environments,
    replacements,
    units,
)
from parallelism.layout import Layout

if TYPE_CHECKING:
    from orchestrator.slots import Slots

EXIT_FAILED = 1
EXIT_CLAIMED = 3
TICK = 1.0  # seconds between two heartbeats, and at most until a marker is noticed
LOG_TAIL = 600  # bytes of a dead rank's log in the reason for giving up

log = logging.getLogger("supervisor")


@dataclass(frozen=True)
class Ending:
    """How the segment ended: an outcome of clusters.events, and why, where that needs words."""

    outcome: str
    reason: str = ""
    final: bool = False  # another segment would fail alike


def main(argv: Sequence[str] | None = None) -> int:
    """Run the segment to its end; the exit code."""
    parser = argparse.ArgumentParser(prog="orchestrator.supervisor")
    parser.add_argument("segment", type=Path)
    parser.add_argument(
        "--entry", default="parallelism.rank:main", help="what the ranks run: MODULE:FUNCTION"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    paths = SegmentPaths(arguments.segment.resolve())
    try:
        supervisor = Supervisor(paths, paths.load(), arguments.entry)
    except (OSError, ValueError) as error:
        sys.exit(f"{paths.segment}: {error}")
    with runtime_directory() as runtime:
        if not supervisor.claim(runtime):
            return EXIT_CLAIMED
        return EXIT_FAILED if supervisor.run(runtime).outcome == events.FAILED else 0


class Supervisor:
    """One segment, from its claim to its end."""

    def __init__(self, paths: SegmentPaths, segment: Segment, entry: str) -> None:
        self.paths, self.segment, self.entry = paths, segment, entry
        self.ranks = Layout.from_mapping(segment.layout).ranks
        self.before = time.time() - float(os.environ.get(STARTED, time.time()))  # what the guard has used up
        self.began = time.monotonic()
        self.state, self.generation, self.replaced = "starting", 0, 0
        self.rank_events = 0  # offset of the first event of the ranks that we have not seen
        self.signalled = False
        self.draining: str | None = None  # why
        self.drain_until = float("inf")

    @property
    def elapsed(self) -> float:
        """Seconds since the guard's start, whatever happens to the clock."""
        return self.before + time.monotonic() - self.began

    def claim(self, runtime: Path) -> bool:
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
        facts = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        incarnation = {**facts, "runtime": str(runtime)}
        if not claim(self.paths, incarnation):
            log.error("segment %s is claimed already: %s", self.segment.key, self.paths.claim.read_text())
            return False
        self.events = EventWriter(self.paths.events / "supervisor.jsonl")
        self.events.emit(
            events.SEGMENT_CLAIMED, incarnation=incarnation, host=facts["host"], pid=facts["pid"]
        )
        return True

    def run(self, runtime: Path) -> Ending:
        """Never raises for what goes wrong in the segment: that is its ending."""
        try:
            ending = self._run(runtime)
        except Exception as error:
            log.exception("the supervisor failed")
            ending = Ending(events.FAILED, f"supervisor: {error!r}")
        self._beat("ended")
        spent = units(self.segment, self.elapsed)
        told = {"outcome": ending.outcome, "reason": ending.reason, "final": ending.final}
        self.events.emit(events.SEGMENT_ENDED, **told, units=spent)
        log.info("ended: %s %s", ending.outcome, ending.reason)
        return ending

    def _run(self, runtime: Path) -> Ending:
        self._heed_signals()
        self._tick()
        if self.draining:
            return Ending(events.DRAINED, self.draining)
        try:
            slots = _form_slots(self.ranks, runtime, self.paths, self.entry)
        except SystemExit as end:
            if end.code != signal.SIGTERM:
                raise RuntimeError(f"Ray did not start: {end}") from end
            self.signalled = True  # Ray's own answer to SIGTERM, while it starts
            self._tick()
            return Ending(events.DRAINED, "signal received")
        try:
            self._heed_signals()
            return self._supervise(slots)
        finally:
            slots.close()

    def _supervise(self, slots: Slots) -> Ending:
        """Generations of ranks, until one ends well or there is no sense in another."""
        while True:
            failures = self._assemble(slots)
            if not failures:
                if self.draining:  # no rank is running, and the last checkpoint is what it is
                    return Ending(events.DRAINED, self.draining)
                failures = self._start(slots)
            ending = self._watch(slots, failures)
            if ending is not None:
                return ending

    def _assemble(self, slots: Slots) -> list[End]:
        """Wait until all slots are ready; those that failed. Empty, too, if we are to drain instead."""
        self.state = "importing"
        failures: list[End] = []
        while not (slots.ready or failures or self.draining):
            failures = slots.prepare(TICK)
            self._tick()
        if slots.ready and not self.generation:
            self.events.emit(events.RUNTIME_READY, seconds=self.elapsed)
        return failures

    def _start(self, slots: Slots) -> list[End]:
        """Start the next generation; the ranks that failed to start."""
        self.generation += 1
        self.state = "running"
        places = [facts for facts in slots.facts if facts]
        addresses, hosts = [place["address"] for place in places], [place["host"] for place in places]
        environments = rank_environments(addresses, places[0]["port"], self.generation)
        failures = slots.start(environments, self.paths.root)
        self.events.emit(events.RANKS_STARTED, generation=self.generation, pids=slots.pids, hosts=hosts)
        log.info("generation %d started: processes %s", self.generation, slots.pids)
        return failures

    def _watch(self, slots: Slots, ends: list[End]) -> Ending | None:
        """Until the island has ended; None when it is to be replaced, and then no rank is left of it."""
        while (verdict := judge(ends, self.ranks, time.time(), self.segment.drain_seconds)) is None:
            if time.monotonic() > self.drain_until:
                return self._undrained()  # ranks do not outlive their slots
            ends += slots.ends(TICK)
            self._tick()
        if verdict.outcome is not None:
            return Ending(verdict.outcome, self.draining or "")
        for end in ends:
            self._tell_death(end)
        return self._set_back(verdict, bad_input([*ends, *slots.kill()]))

    def _set_back(self, verdict: Verdict, bad: End | None) -> Ending | None:
        """After a failure: None to go on. What is bad stays bad: then nobody is replaced."""
        log.warning("%s", verdict.reason)
        if bad is not None:
            told = _last_line(self.paths.logs / f"rank-{bad.rank:04d}.log")
            return Ending(events.FAILED, f"rank {bad.rank}: {told}", final=True)
        if self.draining:
            return Ending(events.FAILED, f"{verdict.reason}, while draining ({self.draining})")
        self.state = "recovering"
        allowed = self.segment.max_restarts
        counted = replacements(self.replaced, self._saved_since_last_time(), allowed)
        if counted is None:
            tail = (
                _tail(self.paths.logs / f"rank-{verdict.culprit:04d}.log")
                if verdict.culprit is not None
                else ""
            )
            return Ending(
                events.FAILED, f"{verdict.reason}; {allowed} replacements saved no checkpoint{tail}"
            )
        self.replaced = counted
        return None

    def _saved_since_last_time(self) -> bool:
        saved = False
        while True:
            fresh, offset = read_events(self.paths.events / "ranks.jsonl", self.rank_events)
            if offset == self.rank_events:
                return saved
            saved |= any(event["kind"] == events.CHECKPOINT_SAVED for event in fresh)
            self.rank_events = offset

    def _undrained(self) -> Ending:
        waited = f"{self.segment.drain_seconds:.0f} s"
        return Ending(events.FAILED, f"ranks did not save and end within {waited} ({self.draining})")

    def _tell_death(self, end: End) -> None:
        if end.outcome is None:
            told = {"rank": end.rank, "pid": end.pid, "exit_code": end.exit_code, "signal": end.signal}
            self.events.emit(events.RANK_DIED, generation=self.generation, **told, note=end.note)

    def _tick(self) -> None:
        """Once a second: show that we live, and see whether it is time to drain."""
        if self.draining is None:
            stop = self.paths.stop.exists()
            self.draining = drain_reason(self.segment, self.elapsed, stop, self.signalled)
            if self.draining is not None:
                self._drain(self.draining)
        self._beat(self.state)

    def _drain(self, reason: str) -> None:
        self.state = "draining"
        self.drain_until = time.monotonic() + self.segment.drain_seconds
        self.paths.drain.write_text(reason)
        self.events.emit(events.SEGMENT_DRAINING, reason=reason)

    def _beat(self, state: str) -> None:
        """Not synced to disk: a lost heartbeat is followed by the next one."""
        beat = {"time": time.time(), "generation": self.generation, "state": state}
        fresh = self.paths.heartbeat.with_name(".heartbeat.tmp")
        fresh.write_text(json.dumps(beat))
        fresh.replace(self.paths.heartbeat)

    def _heed_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self.signalled = True


def _form_slots(ranks: int, runtime: Path, paths: SegmentPaths, entry: str) -> Slots:
    configure_ray(runtime)
    from orchestrator.slots import Slots  # Ray is configured by the environment that it is imported in

    return Slots(ranks, runtime, paths.logs, entry)


def _tail(path: Path) -> str:
    """The end of a log, as an addition to a reason; empty if there is none."""
    try:
        text = path.read_text(errors="replace")[-LOG_TAIL:].strip()
    except OSError:
        return ""
    return f"; {path.name} ends: {text}" if text else ""


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].removeprefix("eurotrain: ") if lines else "bad input, and no word about it"


if __name__ == "__main__":
    sys.exit(main())
