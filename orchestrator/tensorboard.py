"""What TensorBoard shows of a run, written from its events: one directory per island, one for the whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clusters import events as site_kinds
from orchestrator.fold import Event

if TYPE_CHECKING:
    from tensorboard.summary import Writer

MERGED = "all"


class Curves:
    """Scalars of a run. Derived from the event log alone, so a new controller starts them afresh."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        self._writers: dict[str, Writer] = {}
        self._latest: dict[int, dict[str, dict[str, float]]] = {}  # step -> site -> facts of that step
        self._highest: dict[str, int] = {}

    def add(self, event: Event) -> None:
        """Take an event into the curves it belongs to."""
        if event.kind == site_kinds.STEP:
            self._step(event)
        elif event.kind == site_kinds.ROUND_APPLIED:
            value = event.facts["update_norm"]
            self._write(event.site, "outer/update_norm", value, event.facts["step"], event.time)
            self._write(MERGED, "outer/update_norm", value, event.facts["step"], event.time)

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _step(self, event: Event) -> None:
        facts, step = event.facts, event.facts["step"]
        rate = facts["tokens"] / facts["seconds"]
        for tag, value in (
            ("train/loss", facts["loss"]),
            ("train/learning_rate", facts["learning_rate"]),
            ("train/grad_norm", facts["grad_norm"]),
            ("train/tokens_per_second", rate),
        ):
            self._write(event.site, tag, value, step, event.time)
        self._merge(event.site, step, {"loss": facts["loss"], "rate": rate}, event.time)

    def _merge(self, site: str, step: int, facts: dict[str, float], time: float) -> None:
        """The mean over the islands that trained this step, once all known ones have told of it."""
        self._highest[site] = max(step, self._highest.get(site, 0))
        told = self._latest.setdefault(step, {})
        told[site] = facts
        if len(told) < len(self._highest):
            return
        self._write(MERGED, "train/loss", sum(f["loss"] for f in told.values()) / len(told), step, time)
        self._write(MERGED, "train/tokens_per_second", sum(f["rate"] for f in told.values()), step, time)
        for old in [s for s in self._latest if s < min(self._highest.values())]:
            del self._latest[old]

    def _write(self, who: str, tag: str, value: float, step: int, time: float) -> None:
        if who not in self._writers:
            from tensorboard.summary import Writer

            self._writers[who] = Writer(str(self._folder / who))
        self._writers[who].add_scalar(tag, value, step, wall_time=time)
