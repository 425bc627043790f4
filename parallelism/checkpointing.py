"""Checkpoints of an island: saved by all its ranks, restored in any layout."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from checkpoints.attempts import begin, candidates, commit, prune, survey
from checkpoints.manifest import Damaged
from checkpoints.reader import Missing, Reader, Shard
from checkpoints.store import write_shards
from clusters.events import CHECKPOINT_DAMAGED, CHECKPOINT_SAVED
from clusters.paths import SitePaths
from clusters.segment import Segment
from parallelism.control import Control
from parallelism.layout import Layout
from parallelism.megatron.randomness import random_state, set_random_state
from parallelism.megatron.trainer import Trainer
from parallelism.outer import Outer


@dataclass
class Progress:
    """How far an island is."""

    step: int = 0  # completed
    tokens: int = 0  # trained by this island, all its segments together
    finished: bool = False  # the last step is done, and its round applied


class Checkpoints:
    """The island's checkpoints. Every method is called by all ranks."""

    def __init__(self, segment: Segment, control: Control, trainer: Trainer, outer: Outer | None) -> None:
        self.segment, self.control = segment, control
        self.trainer, self.outer = trainer, outer
        self.paths = SitePaths(Path(segment.scratch))
        self.directory = self.paths.checkpoints(segment.run, segment.site)
        self._saved: dict[str, Any] | None = None  # the facts of what was saved or restored last

    def restore(self) -> tuple[Progress, Path | None]:
        """Go on from the newest checkpoint that all ranks can read; from the beginning when there is none.

        Raises ValueError when there are checkpoints and none can be used: starting over is for the user to
        decide, by removing them.
        """
        found = self.control.from_leader(self._candidates)
        for path in found:
            problem = self.control.first_problem(self._read(path))
            if problem is None:
                return self._resume(path), path
            self.control.tell(CHECKPOINT_DAMAGED, path=str(path), reason=problem)
        damaged = self.control.from_leader(lambda: len(survey(self.directory).damaged))
        if found or damaged:
            raise ValueError(
                f"{self.directory}: no checkpoint can be read; remove all to start from the beginning"
            )
        return Progress(), None

    def due(self, step: int) -> bool:
        return step > 0 and step % self.segment.checkpointing.every_steps == 0

    def save(self, progress: Progress) -> None:
        """Save and commit, unless nothing has changed since; then delete what is no longer needed."""
        facts = self._facts(progress)
        if facts == self._saved:
            return
        began = time.monotonic()
        name = f"step-{progress.step:08d}"
        attempt = self.control.from_leader(lambda: begin(self.directory, name))
        size = write_shards(attempt, self.control.rank, self._owned())
        (total,) = self.control.sum(size)  # all parts are written
        if self.control.leads:
            commit(attempt, self.control.ranks, "checkpoint", facts)
            facts_told = {"path": str(attempt), "bytes": int(total), "seconds": time.monotonic() - began}
            self.control.tell(CHECKPOINT_SAVED, step=progress.step, **facts_told)
            prune(self.directory, self.segment.checkpointing.keep)
            self._forget_rounds()
        self._saved = facts

    def _candidates(self) -> list[Path]:
        found = survey(self.directory)
        for damage in found.damaged:
            self.control.tell(CHECKPOINT_DAMAGED, path=str(damage.path), reason=damage.reason)
        return found.intact

    def _read(self, path: Path) -> str | None:
        """Fill this rank's state; what is wrong with the checkpoint, if something is."""
        try:
            reader = Reader(path)
            self._check_same(path, reader.facts)
            for shard in self._held(reader.facts):
                reader.read(shard)
        except (Damaged, Missing) as problem:
            return str(problem)
        return None

    def _resume(self, path: Path) -> Progress:
        facts = Reader(path).facts
        self.trainer.resume(facts["step"])
        if self.outer is not None:
            self.outer.restore(facts["outer"])
        if self._same_layout(facts):
            set_random_state(self._random)
        progress = Progress(facts["step"], facts["tokens"], facts["finished"])
        self._saved = self._facts(progress)
        return progress

    def _facts(self, progress: Progress) -> dict[str, Any]:
        return {
            **asdict(progress),
            "run": self.segment.run,
            "site": self.segment.site,
            "layout": asdict(Layout.from_mapping(self.segment.layout)),
            "model": asdict(self.segment.model),
            "seed": self.segment.training.seed,
            "precision": self.segment.training.precision,
            "sequence_length": self.segment.training.sequence_length,
            "outer": self.outer.facts() if self.outer else None,
            "code": _code_version(),
        }

    def _check_same(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Raises ValueError for a checkpoint of another training; `site`, `layout`, `code` may change."""
        expected = self._facts(Progress())
        for key in ("run", "model", "seed"):
            if facts.get(key) != expected[key]:
                raise ValueError(f"{path}: its {key} is {facts.get(key)}, this segment's is {expected[key]}")
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
        return bool(facts["layout"] == self._facts(Progress())["layout"])

    def _random_shard(self) -> Shard:
        return Shard(f"random.{self.control.rank}", tuple(self._random.shape), (0,), self._random)

    def _forget_rounds(self) -> None:
        """Delete updates that no kept checkpoint would have to apply again."""
        if self.outer is None:
            return
        applied = min(Reader(path).facts["outer"]["round"] for path in candidates(self.directory))
        for box in (self.paths.outbox, self.paths.inbox):
            newest = box(self.segment.run, applied, self.segment.site).parent
            for folder in newest.parent.glob("round-*"):
                if folder.name <= newest.name:
                    shutil.rmtree(folder, ignore_errors=True)


def _code_version() -> str:
    try:
        return version("eurotrain")
    except PackageNotFoundError:
        return "not installed"
