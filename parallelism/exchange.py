"""An island's part in the rounds between sites: contribute, wait a while, apply, or go on without."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from checkpoints.attempts import begin
from checkpoints.manifest import MANIFEST, Manifest
from checkpoints.quantised import CutMaxima
from checkpoints.reader import Missing, Reader
from checkpoints.store import write_shards
from checkpoints.update import Header
from clusters.events import ROUND_APPLIED, ROUND_CONTRIBUTED, ROUND_OPEN
from clusters.paths import SitePaths
from clusters.rounds import ClosedRound
from clusters.segment import Segment
from parallelism.control import Control
from parallelism.drift import added
from parallelism.megatron.trainer import Trainer
from parallelism.outer import Average, Outer
from parallelism.updates import commit_update


class Refused(ValueError):
    """A closed round that this island cannot apply: damaged, not finite, or of another base."""


class Exchange:
    """The island at its boundaries, every `inner_steps` steps. Every method is called by all ranks."""

    def __init__(self, segment: Segment, control: Control, trainer: Trainer, outer: Outer) -> None:
        self.segment, self.control = segment, control
        self.trainer, self.outer = trainer, outer
        self.rounds = outer.rounds
        self.paths = SitePaths(Path(segment.scratch))
        self.unanswered = 0  # boundaries in a row that brought no closed round

    def due(self, step: int) -> bool:
        """At every boundary and at the last step, as long as there is something to tell or to hear: a
        restored island that had met this boundary already has neither."""
        at_boundary = step % self.rounds.inner_steps == 0 or step == self.segment.training.steps
        return at_boundary and (self.outer.open or self.outer.tokens > 0)

    def catch_up(self, step: int) -> int:
        """Apply, in order, the closed rounds that are there; how many there were. Raises Refused."""
        count = 0
        while self.control.from_leader(lambda: self._closed(step)):
            self._apply(step, waited=0.0)
            count += 1
        return count

    def meet(self, step: int) -> bool:
        """Contribute, and wait for the round; False when there were too many boundaries without any.

        Rounds that were closed meanwhile come first: what this island trained since its last contribution
        then goes into the round that is open now, and not, too late, into one that is gone.
        """
        answered = self.catch_up(step)
        if not self.outer.open and self.outer.tokens > 0:
            self._contribute(step)
        if self.outer.open:
            answered += self._wait(step)
        self.unanswered = 0 if answered else self.unanswered + 1
        last_chance = step == self.segment.training.steps
        return not (self.outer.open and (last_chance or self.unanswered >= self.rounds.max_open_rounds))

    def _wait(self, step: int) -> int:
        """How many rounds were applied. None when the segment drains: whoever goes on waits again."""
        began = time.monotonic()
        arrived = self.control.wait_for(lambda: self._closed(step), self.rounds.deadline_seconds)
        waited = time.monotonic() - began
        if arrived:
            self._apply(step, waited)
            return 1 + self.catch_up(step)
        if not self.control.draining:
            self.control.tell(ROUND_OPEN, round=self.outer.round + 1, step=step, waited_seconds=waited)
        return 0

    def _contribute(self, step: int) -> None:
        outbox = self.paths.outbox(self.segment.run, self.outer.round + 1, self.segment.site)
        cuts, header = self._agree(step)
        attempt = self.control.from_leader(lambda: begin(outbox.parent, outbox.name))
        write_shards(attempt, self.control.rank, self.outer.contribution(cuts))
        self.control.sum()  # all parts are written
        if self.control.leads:
            self._tell_contribution(commit_update(attempt, outbox, self.control.ranks, header))
        self.outer.open = True

    def _agree(self, step: int) -> tuple[list[CutMaxima], Header]:
        """What the ranks must know of each other before each writes its part of an update."""
        told = self.control.gather((self.outer.cuts(), self.outer.sketch()))
        cuts = [cut for cuts, _ in told for cut in cuts]
        return cuts, self.outer.header(step, added(sketch for _, sketch in told))

    def _apply(self, step: int, waited: float) -> None:
        closed = self.control.from_leader(self._read_closed)
        average, problem = self._average(closed)
        refusal = self.control.first_problem(problem)
        if refusal is not None or average is None:
            raise Refused(f"round {closed.number} cannot be applied: {refusal}")
        last = step == self.segment.training.steps
        (squares,) = self.control.sum(self.outer.advance(average, last=last))
        self.trainer.reload()
        included = any(part.site == self.segment.site for part in closed.contributions)
        facts = {"update_norm": math.sqrt(squares), "included": included, "waited_seconds": waited}
        self.control.tell(ROUND_APPLIED, round=closed.number, step=step, **facts)

    def _average(self, closed: ClosedRound) -> tuple[Average | None, str | None]:
        try:
            return self.outer.average(closed, self._opener(closed.number)), None
        except (ValueError, Missing, OSError) as problem:  # Damaged is a ValueError
            return None, str(problem)

    def _opener(self, number: int) -> Callable[[str], Reader]:
        run, own = self.segment.run, self.segment.site
        return lambda site: Reader(
            self.paths.outbox(run, number, site) if site == own else self.paths.inbox(run, number, site)
        )

    def _closed(self, step: int) -> bool:
        """Whether the next round is there to be applied. One that holds what this island will contribute
        at a later step, for it was set back to a checkpoint, waits until then: as it was the first time."""
        if not self._closed_path().exists():
            return False
        outbox = self.paths.outbox(self.segment.run, self.outer.round + 1, self.segment.site)
        return not (outbox / MANIFEST).exists() or Reader(outbox).facts["step"] <= step

    def _read_closed(self) -> ClosedRound:
        return ClosedRound.from_json(self._closed_path().read_text())

    def _closed_path(self) -> Path:
        return self.paths.closed_round(self.segment.run, self.outer.round + 1)

    def _tell_contribution(self, manifest: Manifest) -> None:
        facts = {"step": manifest.facts["step"], "tokens": manifest.facts["tokens"]}
        digest = {"sha256": manifest.sha256, "bytes": manifest.bytes}
        self.control.tell(ROUND_CONTRIBUTED, round=self.outer.round + 1, **facts, **digest)
