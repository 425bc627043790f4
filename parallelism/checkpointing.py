"""Checkpoints of an island: saved by all its ranks while they train on, restored in any layout."""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import fast
from checkpoints.attempts import Retention, attempt_path, survey, unused_number
from checkpoints.manifest import Damaged
from checkpoints.reader import Missing, Reader, Shard
from checkpoints.saver import Outcome, Saver
from checkpoints.writer import Commit
from clusters.events import CHECKPOINT_DAMAGED, CHECKPOINT_FAILED, CHECKPOINT_SAVED
from clusters.paths import SitePaths
from clusters.segment import Segment
from parallelism import provenance
from parallelism.control import Control
from parallelism.layout import Layout
from parallelism.megatron.randomness import random_state, set_random_state
from parallelism.megatron.trainer import Trainer
from parallelism.outer import Outer
from parallelism.peers import Peers


@dataclass
class Progress:
    """How far an island is."""

    step: int = 0  # completed
    tokens: int = 0  # trained by this island, all its segments together
    finished: bool = False  # the last step is done, and its round applied


class Checkpoints:
    """The island's checkpoints. Every method is called by all ranks, `restore` first."""

    def __init__(self, segment: Segment, control: Control, trainer: Trainer, outer: Outer | None) -> None:
        self.segment, self.control = segment, control
        self.trainer, self.outer = trainer, outer
        self.paths = SitePaths(Path(segment.scratch))
        self.directory = self.paths.checkpoints(segment.run, segment.site)
        self.parent: dict[str, Any] | None = None  # the checkpoint that this incarnation went on from
        self._newest: dict[str, Any] | None = None  # what of the newest save (or restored) can change
        self._problem: str | None = None  # rank 0: why the save that ended last failed
        self._tier: Path | None = None  # this node's copies
        self._bad_copy: str | None = None  # what is wrong with one of them
        self._times = Counter[int]()  # saves of each step in this incarnation

    def restore(self) -> tuple[Progress, Path | None]:
        """Go on from the newest checkpoint that all ranks can read; from the beginning when there is none.

        Raises ValueError when there are checkpoints and none can be used: starting over is for the user to
        decide, by removing them.
        """
        self._tier = self._open_tier()
        self._peers = Peers(self.control, self._tier, self.segment.checkpointing.peers)
        progress, path = self._restore()
        # names of all attempts to come, agreed upon now: saving needs no word between the ranks
        look = lambda: (unused_number(self.directory), secrets.token_hex(8))  # noqa: E731
        self._number, identity = self.control.from_leader(look)
        rank, device = self.control.rank, self.control.device
        patience = self.segment.checkpointing.writer_timeout_seconds
        copies = self._tier, self._peers.neighbour
        self._saver = Saver(rank, identity, patience, device.pin, device.synchronize, *copies)
        self._saver.prepare(self._owned())
        return progress, path

    def due(self, step: int) -> bool:
        return step > 0 and step % self.segment.checkpointing.every_steps == 0

    def save(self, progress: Progress) -> None:
        """Take the state as it is now and have it written, unless nothing has changed since the last time.

        No rank waits for another. A save that fails is told of by `watch`, and training goes on.
        """
        changing = self._changing(progress)
        if changing == self._newest:
            return
        number = self._number + self._times[progress.step]
        self._times[progress.step] += 1
        attempt = attempt_path(self.directory, f"step-{progress.step:08d}", number)
        self._saver.save(attempt, self._owned(), self._commit(progress) if self.control.leads else None)
        self._newest = changing

    def watch(self) -> None:
        """Tell of saves that have ended. Waits for nothing."""
        self._tell(self._saver.watch())

    def finish(self, progress: Progress) -> None:
        """Save, and wait until that has been committed. Raises OSError when it fails twice."""
        for _ in range(2):
            self.save(progress)
            self.wait()
            problem = self.control.from_leader(lambda: self._problem)
            if problem is None:
                return
            self._newest = None
        raise OSError(f"{self.directory}: step {progress.step} cannot be saved: {problem}")

    def wait(self) -> None:
        """Until none of this rank's saves is under way."""
        self._tell(self._saver.finish())

    def close(self) -> None:
        """Whatever is under way. The node is left as it was found."""
        self._saver.close()
        self._peers.close()
        if self._tier is not None:
            fast.forget(self._tier, self.control.rank)

    def _tell(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            told = {"step": _step(outcome.attempt), "path": str(outcome.attempt)}
            if not self.control.leads:
                if outcome.problem:
                    sys.stderr.write(f"{outcome.attempt}: {outcome.problem}\n")
                continue
            self._problem = outcome.problem
            if outcome.problem is not None:
                self.control.tell(CHECKPOINT_FAILED, **told, reason=outcome.problem)
                continue
            took = {"seconds": outcome.seconds, "stall_seconds": outcome.stall_seconds}
            self.control.tell(CHECKPOINT_SAVED, **told, bytes=outcome.bytes, **took)
            self._forget_rounds(outcome.kept)

    def _restore(self) -> tuple[Progress, Path | None]:
        found = self.control.from_leader(self._candidates)
        for path in found:
            problem = self.control.first_problem(self._read(path))
            if problem is None:
                self._tell_bad_copies(path)
                return self._resume(path), path
            self.control.tell(CHECKPOINT_DAMAGED, path=str(path), reason=problem)
        damaged = self.control.from_leader(lambda: len(survey(self.directory).damaged))
        if found or damaged:
            raise ValueError(
                f"{self.directory}: no checkpoint can be read; remove all to start from the beginning"
            )
        return Progress(), None

    def _open_tier(self) -> Path | None:
        """The node's own place for copies. Where there is none, the site's file system is enough."""
        given = self.segment
        try:
            tier = given.checkpointing.fast
            return fast.open_tier(tier, given.run, given.site) if tier else None
        except OSError as error:
            sys.stderr.write(f"checkpoint.fast = {given.checkpointing.fast} is not used: {error}\n")
            return None

    def _tell_bad_copies(self, path: Path) -> None:
        damage = self.control.first_problem(self._bad_copy)
        if damage is not None:
            reason = f"{damage}; the file on the site's file system is used"
            self.control.tell(CHECKPOINT_DAMAGED, path=str(path), reason=reason)

    def _candidates(self) -> list[Path]:
        found = survey(self.directory)
        for damage in found.damaged:
            self.control.tell(CHECKPOINT_DAMAGED, path=str(damage.path), reason=damage.reason)
        return found.intact

    def _read(self, path: Path) -> str | None:
        """Fill this rank's state; what is wrong with the checkpoint, if something is."""
        try:
            own = [self._tier / path.name] if self._tier else []
            reader = Reader(path, [*own, *self._peers.copies(path.name)])
            self._check_same(path, reader.facts)
            for shard in self._held(reader.facts):
                reader.read(shard)
            self._bad_copy = next(map(str, reader.bad_copies.values()), None)
        except (Damaged, Missing) as problem:
            return str(problem)
        return None

    def _resume(self, path: Path) -> Progress:
        manifest = Reader(path).manifest
        facts = manifest.facts
        self.trainer.resume(facts["step"])
        if self.outer is not None:
            self.outer.restore(facts["outer"])
        if self._same_layout(facts):
            set_random_state(self._random)
        progress = Progress(facts["step"], facts["tokens"], facts["finished"])
        self.parent = {"name": path.name, "site": facts["site"], "sha256": manifest.sha256}
        self._newest = self._changing(progress)
        return progress

    def _changing(self, progress: Progress) -> dict[str, Any]:
        return {**asdict(progress), "outer": self.outer.facts() if self.outer else None}

    def _commit(self, progress: Progress) -> Commit:
        given = self.segment.checkpointing
        retention = Retention(given.keep, given.keep_every_seconds, given.milestone_steps)
        # every rank's own patience ends first, and what it then says is better than "no sign"
        return Commit(self.control.ranks, self._facts(progress), 2 * given.writer_timeout_seconds, retention)

    def _facts(self, progress: Progress) -> dict[str, Any]:
        return {
            **self._changing(progress),
            "time": time.time(),
            **self._identity(),
            "site": self.segment.site,
            "layout": asdict(Layout.from_mapping(self.segment.layout)),
            "precision": self.segment.training.precision,
            "sequence_length": self.segment.training.sequence_length,
            "data": provenance.cursor(self.segment, progress.step),
            "config": provenance.config(self.segment),
            "code": provenance.code(),
            "parent": self.parent,
        }

    def _identity(self) -> dict[str, Any]:
        training = self.segment.training
        return {"run": self.segment.run, "model": asdict(self.segment.model), "seed": training.seed}

    def _check_same(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Raises ValueError for a checkpoint of another training; `site`, `layout`, `code` may change."""
        for key, expected in self._identity().items():
            if facts.get(key) != expected:
                raise ValueError(f"{path}: its {key} is {facts.get(key)}, this segment's is {expected}")
        if (facts.get("outer") is None) != (self.outer is None):
            raise ValueError(
                f"{path}: was saved {'without' if self.outer else 'with'} rounds, unlike this segment"
            )

    def _owned(self) -> Iterator[Shard]:
        """What this rank writes."""
        yield from self.trainer.owned_parameter_shards()
        yield from self.trainer.owned_state_shards()
        if self.outer is not None:
            yield from self.outer.owned_state_shards()
        self._random = random_state()
        yield self._random_shard()

    def _held(self, facts: Mapping[str, Any]) -> Iterator[Shard]:
        """What this rank reads."""
        yield from self.trainer.parameter_shards()
        yield from self.trainer.state_shards()
        if self.outer is not None:
            yield from self.outer.state_shards()
        if self._same_layout(facts):
            self._random = random_state()
            yield self._random_shard()

    def _same_layout(self, facts: Mapping[str, Any]) -> bool:
        """Random states belong to ranks: in another layout they mean nothing, and nothing draws from them."""
        return bool(facts["layout"] == asdict(Layout.from_mapping(self.segment.layout)))

    def _random_shard(self) -> Shard:
        return Shard(f"random.{self.control.rank}", tuple(self._random.shape), (0,), self._random)

    def _forget_rounds(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Delete updates that none of the newest checkpoints would have to apply again."""
        if self.outer is None or not kept:
            return
        newest = [facts["outer"]["round"] for facts in kept[: self.segment.checkpointing.keep]]
        for box in (self.paths.outbox, self.paths.inbox):
            last = box(self.segment.run, min(newest), self.segment.site).parent
            for folder in last.parent.glob("round-*"):
                if folder.name <= last.name:
                    shutil.rmtree(folder, ignore_errors=True)


def _step(attempt: Path) -> int:
    return int(attempt.stem.removeprefix("step-"))
