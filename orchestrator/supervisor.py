"""Owns one segment inside an allocation: starts its ranks, watches, replaces and drains them.

`python -P -m orchestrator.supervisor [--slurm] SEGMENT_DIR`, under `clusters.guard`. Exit codes: 0 completed,
drained or starved; 1 failed; 3 another incarnation has the segment. SIGTERM and SIGINT drain it. It needs no
controller: it knows its own limits, and tells what happens in events/supervisor.jsonl. With `--slurm` its
ranks lie on all nodes of the job that it runs in, else on this one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import secrets
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
from clusters.steps import node_names
from orchestrator.meanwhile import meanwhile
from orchestrator.node import without_stop_signals
from orchestrator.nodes import Nodes, NodesLost
from orchestrator.rank_logs import last_line, tail
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
    parser.add_argument("--slurm", action="store_true", help="use all nodes of the job")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    paths = SegmentPaths(arguments.segment.resolve())
    try:
        supervisor = Supervisor(paths, paths.load(), arguments.entry, arguments.slurm)
    except (OSError, ValueError) as error:
        sys.exit(f"{paths.segment}: {error}")
    with runtime_directory() as runtime:
        if not supervisor.claim(runtime):
            return EXIT_CLAIMED
        return EXIT_FAILED if supervisor.run(runtime).outcome == events.FAILED else 0


class Supervisor:
    """One segment, from its claim to its end."""

    def __init__(self, paths: SegmentPaths, segment: Segment, entry: str, slurm: bool = False) -> None:
        self.paths, self.segment, self.entry, self.slurm = paths, segment, entry, slurm
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
        self.state = "ended"
        self._beat()
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
            with meanwhile(self._beat, TICK):
                slots = self._form_slots(runtime)
        except SystemExit as end:
            if end.code != signal.SIGTERM:
                raise RuntimeError(f"Ray did not start: {end}") from end
            self.signalled = True  # Ray's own answer to SIGTERM, while it starts
            self._tick()
            return Ending(events.DRAINED, "signal received")
        lost: list[str] = []
        try:
            return self._supervise(slots)
        except NodesLost as loss:
            lost = [node.host for node in loss.nodes]
            return self._end_without(loss)
        finally:
            self.state = "ending"
            with meanwhile(self._beat, TICK):
                slots.close(lost)

    def _form_slots(self, runtime: Path) -> Slots:
        hosts = node_names() if self.slurm else [socket.gethostname()]
        configure_ray(runtime, secrets.token_hex(32))
        from orchestrator.slots import Slots  # Ray is configured by the environment that it is imported in

        nodes = Nodes(self.paths.root, self.segment.drain_seconds)
        # Slurm sends SIGTERM to all processes of a job; alone it is for us, and Ray then ends 2 s faster
        with without_stop_signals() if self.slurm else contextlib.nullcontext():
            slots = Slots(self.ranks, hosts, runtime, nodes, self.entry)
            self._heed_signals()
        return slots

    def _end_without(self, loss: NodesLost) -> Ending:
        """There are no others to go on with: the next segment of the chain gets other nodes."""
        for node in loss.nodes:
            log.error("%s", node)
            told = {"host": node.host, "reason": node.reason}
            self.events.emit(events.NODE_LOST, generation=self.generation, **told)
        return Ending(events.FAILED, str(loss))

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
        places = [place for place in slots.places if place]
        environments = rank_environments(places, self.generation, os.environ)
        failures = slots.start(environments, self.paths.root)
        self.events.emit(events.RANKS_STARTED, generation=self.generation, pids=slots.pids, hosts=slots.hosts)
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
            self._tell_death(end, slots.hosts[end.rank])
        return self._set_back(verdict, bad_input([*ends, *slots.kill()]))

    def _set_back(self, verdict: Verdict, bad: End | None) -> Ending | None:
        """After a failure: None to go on. What is bad stays bad: then nobody is replaced."""
        log.warning("%s", verdict.reason)
        if bad is not None:
            return Ending(
                events.FAILED, f"rank {bad.rank}: {last_line(self.paths.logs, bad.rank)}", final=True
            )
        if self.draining:
            return Ending(events.FAILED, f"{verdict.reason}, while draining ({self.draining})")
        self.state = "recovering"
        allowed = self.segment.max_restarts
        counted = replacements(self.replaced, self._saved_since_last_time(), allowed)
        if counted is None:
            reason = f"{verdict.reason}; {allowed} replacements saved no checkpoint"
            return Ending(events.FAILED, reason + tail(self.paths.logs, verdict.culprit))
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

    def _tell_death(self, end: End, host: str) -> None:
        if end.outcome is None:
            told = {name: getattr(end, name) for name in ("rank", "pid", "exit_code", "signal", "note")}
            self.events.emit(events.RANK_DIED, generation=self.generation, host=host, **told)

    def _tick(self) -> None:
        """Once a second: show that we live, and see whether it is time to drain."""
        if self.draining is None:
            stop = self.paths.stop.exists()
            self.draining = drain_reason(self.segment, self.elapsed, stop, self.signalled)
            if self.draining is not None:
                self._drain(self.draining)
        self._beat()

    def _drain(self, reason: str) -> None:
        self.state = "draining"
        self.drain_until = time.monotonic() + self.segment.drain_seconds
        self.paths.drain.write_text(reason)
        self.events.emit(events.SEGMENT_DRAINING, reason=reason)

    def _beat(self) -> None:
        """Not synced to disk: a lost heartbeat is followed by the next one."""
        beat = {"time": time.time(), "generation": self.generation, "state": self.state}
        fresh = self.paths.heartbeat.with_name(".heartbeat.tmp")
        fresh.write_text(json.dumps(beat))
        fresh.replace(self.paths.heartbeat)

    def _heed_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self.signalled = True


if __name__ == "__main__":
    sys.exit(main())
