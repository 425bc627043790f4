"""A site whose agent, files and records are real, and whose jobs are a small script of events.

An island here claims its key, trains in jumps of one round, contributes an update (a real manifest of
one number), waits for the closed round, and ends: what a supervisor and its ranks would leave in the files.
"""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

from crc32c import crc32c

from checkpoints.manifest import MANIFEST, Manifest, Piece
from checkpoints.update import Header
from clusters import agent, events
from clusters.connection import LocalConnection
from clusters.machine import Catalogue
from clusters.own import Own
from clusters.paths import SegmentPaths, SitePaths, claim, write_atomically
from clusters.rounds import ClosedRound, genesis
from clusters.segment import Segment
from clusters.site import Site


@dataclass
class SimulatedIsland:
    """One segment's job: `advance` does the next thing it can do."""

    paths: SegmentPaths
    segment: Segment
    dies_at: int | None = None  # step at which the job is lost without a word
    done: bool = False
    values: dict[int, float] = field(default_factory=dict)  # of the updates, by round, where not 1
    drifts: bool = False  # its base, until it is reset

    def __post_init__(self) -> None:
        self.site = SitePaths(Path(self.segment.scratch))
        self.supervisor = events.EventWriter(self.paths.events / "supervisor.jsonl")
        self.ranks = events.EventWriter(self.paths.events / "ranks.jsonl")
        self.began = time.time()
        assert claim(self.paths, {"pid": os.getpid(), "started": self.began, "job_id": self.segment.key})
        self.supervisor.emit(events.SEGMENT_CLAIMED, incarnation=self.segment.key, host="here", pid=1)
        self.supervisor.emit(events.RANKS_STARTED, generation=0, pids=[1, 2], hosts=["here"] * 2)
        self.step, self.round, self.base, self.reset_from = self._restore()
        self.ranks.emit(
            events.TRAINING_READY, generation=0, step=self.step, checkpoint=None, parameters=1, seconds=0
        )
        self.open = False

    def advance(self) -> None:
        assert self.segment.rounds
        if self.done:
            return
        if self.paths.stop.exists():
            self._save()
            self._end(events.DRAINED)
        elif self.open:
            self._apply()
        elif self.step >= self.segment.training.steps:
            self._end(events.COMPLETED)
        elif self.dies_at is not None and self.step >= self.dies_at:
            self.done = True  # its record stays, its process does not
            claimed = json.loads(self.paths.claim.read_text())
            self.paths.claim.write_text(json.dumps({**claimed, "pid": 2**22 + 1}))
            (self.paths.root / "job.json").unlink(missing_ok=True)
        else:
            self._train(self.segment.rounds.inner_steps)

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.ranks.emit(events.STEP, step=self.step, loss=9.0 - self.step / 100, grad_norm=1.0,
                            learning_rate=0.1, tokens=8, seconds=0.01)  # fmt: skip
        self._save()
        number = self.round + 1
        folder = self.site.outbox(self.segment.run, number, self.segment.site)
        if not (folder / MANIFEST).exists():
            self._write(folder, self._header(number, 8 * steps), self.values.get(number, 1.0))
        sha = Manifest.from_json((folder / MANIFEST).read_text()).sha256
        self.ranks.emit(
            events.ROUND_CONTRIBUTED, round=number, step=self.step, tokens=8 * steps, sha256=sha, bytes=0
        )
        self.open = True

    def _header(self, number: int, tokens: int) -> Header:
        place = (self.segment.run, self.segment.site, number, self.base)
        sketch = {"w": [0.75 if self.drifts else 0.5, 1.0]}
        gives = self.reset_from == self.segment.site
        return Header(*place, tokens, self.step, "none", state=gives, sketch=sketch)

    def _write(self, folder: Path, header: Header, value: float) -> None:
        data = struct.pack("<f", value)
        piece = Piece("w", (1,), (0,), (1,), "float32", "writer-00000.bin", 0, (crc32c(data),))
        folder.mkdir(parents=True)
        (folder / piece.file).write_bytes(data)
        manifest = Manifest("update", (piece,), {piece.file: len(data)}, header.to_facts())
        write_atomically(folder / MANIFEST, manifest.to_json())

    def _apply(self) -> None:
        path = self.site.closed_round(self.segment.run, self.round + 1)
        if not path.exists():
            return
        closed = ClosedRound.from_json(path.read_text())
        assert closed.base == self.base, "the chain of rounds is broken"
        for part in closed.contributions:
            if part.site != self.segment.site:
                inbox = self.site.inbox(self.segment.run, closed.number, part.site)
                assert Manifest.from_json((inbox / MANIFEST).read_text()).sha256 == part.sha256
        self.drifts &= self.reset_from not in [part.site for part in closed.contributions]
        self.round, self.base, self.open = closed.number, closed.identity, False
        self.reset_from = closed.reset_from
        told = {"round": self.round, "step": self.step, "update_norm": 0.5}
        self.ranks.emit(events.ROUND_APPLIED, **told, included=True, waited_seconds=0.1)
        self._save()

    def _end(self, outcome: str) -> None:
        self.ranks.emit(events.TRAINING_ENDED, outcome=outcome, step=self.step)
        self.supervisor.emit(events.SEGMENT_ENDED, outcome=outcome, reason="", units=0.0)
        record = {"start": self.began, "end": self.began + 3.6, "exit_code": 0, "outcome": "completed"}
        write_atomically(self.paths.exit, json.dumps(record))
        self.done = True

    @property
    def _memory(self) -> Path:
        return self.site.checkpoints(self.segment.run, self.segment.site) / "state.json"

    def _save(self) -> None:
        write_atomically(self._memory, json.dumps([self.step, self.round, self.base, self.reset_from]))
        self.ranks.emit(events.CHECKPOINT_SAVED, step=self.step, path="x", bytes=1, seconds=0.1)

    def _restore(self) -> tuple[int, int, str, str]:
        if not self._memory.exists():
            return 0, 0, genesis(self.segment.run), ""
        step, number, base, reset_from = json.loads(self._memory.read_text())
        return step, number, base, reset_from


@dataclass
class SimulatedSite:
    """A connection to a site full of simulated islands; outlives any controller."""

    scratch: Path
    dies_at: dict[str, int] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    drifts: bool = False
    islands: dict[str, SimulatedIsland] = field(default_factory=dict)
    submissions: list[str] = field(default_factory=list)
    exchanges: int = 0

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        del timeout
        self.exchanges += 1
        for island in self.islands.values():
            island.advance()
        answers = self._ask(json.loads(json.dumps(operations)))
        both = zip(operations, answers, strict=True)
        return [self._submit(asked) if asked["op"] == "submit" else answer for asked, answer in both]

    def _ask(self, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The real agent; submissions are replaced by a look-up, so that results stay in order."""
        for operation in operations:
            if operation["op"] == "submit":
                key = json.loads(operation.pop("segment"))["key"]
                operation.update(op="jobs", keys=[key])
            if operation["op"] == "watch":
                operation["seconds"] = 0.0
        request = {"protocol": agent.PROTOCOL, "scratch": str(self.scratch), "operations": operations}
        results = agent.answer(request)["results"]
        assert isinstance(results, list)
        return results

    def _submit(self, operation: dict[str, Any]) -> dict[str, Any]:
        segment = Segment.from_json(operation["segment"])
        paths = SitePaths(self.scratch).segment(segment.key)
        if segment.key not in self.islands:
            self.submissions.append(segment.key)
            self.islands[segment.key] = SimulatedIsland(
                paths, segment, self.dies_at.get(segment.key), values=self.values, drifts=self.drifts
            )
        return {"ok": True, **agent.jobs(SitePaths(self.scratch), [segment.key])["jobs"][segment.key]}

    def fetch(self, source: str, target: Path) -> int:
        return LocalConnection(self.scratch).fetch(source, target)

    def push(self, source: Path, target: str) -> int:
        return LocalConnection(self.scratch).push(source, target)


def site_facts(name: str, scratch: Path) -> Site:
    own = Own(
        scratch, "local", account="a", rank_memory_gib=Fraction(8), rank_tflops=Fraction(1, 100),
        efficiency=Fraction(1, 2), max_ranks=8, max_time=timedelta(days=1),
    )  # fmt: skip
    return Site(name, Catalogue().load("local"), own)
