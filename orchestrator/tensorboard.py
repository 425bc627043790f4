"""What TensorBoard shows of a run, written from its events: one directory per island, one for the whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.state import Event

if TYPE_CHECKING:
    from tensorboard.summary import Writer

MERGED = "all"
_RATE = "train/tokens_per_second"
_UPDATE_NORM = "outer/update_norm"


class Curves:
    """Scalars of a run. Derived from the event log alone, so a new controller starts them afresh."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        self._writers: dict[str, Writer] = {}
        self._islands: set[str] = set()
        self._given_up: set[str] = set()
        self._pending: dict[int, dict[str, dict[str, float]]] = {}  # step -> site -> value by tag
        self._merged_step = 0
        self._merged_round = 0

    def add(self, event: Event) -> None:
        """Take an event into the curves it belongs to."""
        if event.kind == site_kinds.STEP:
            self._step(event)
        elif event.kind == site_kinds.ROUND_APPLIED:
            self._round(event)
        elif event.kind == kinds.RUN_CREATED:
            self._islands = {island["site"] for island in event.facts["plan"]["islands"]}
        elif event.kind == kinds.ISLAND_GIVEN_UP:
            self._given_up.add(event.facts["site"])
            self._merge(event.time)
        elif event.kind == kinds.RUN_RESUMED:
            self._given_up.clear()

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _step(self, event: Event) -> None:
        facts, step = event.facts, event.facts["step"]
        values = {
            "train/loss": facts["loss"],
            "train/learning_rate": facts["learning_rate"],
            "train/grad_norm": facts["grad_norm"],
            _RATE: facts["tokens"] / facts["seconds"],
        }
        for tag, value in values.items():
            self._write(event.site, tag, value, step, event.time)
        if step > self._merged_step:  # a restarted island repeats steps
            self._pending.setdefault(step, {})[event.site] = values
            self._merge(event.time)

    def _round(self, event: Event) -> None:
        """All islands apply the same update: the first one's norm stands for the whole."""
        facts = event.facts
        self._write(event.site, _UPDATE_NORM, facts["update_norm"], facts["step"], event.time)
        if facts["round"] > self._merged_round:
            self._merged_round = facts["round"]
            self._write(MERGED, _UPDATE_NORM, facts["update_norm"], facts["step"], event.time)

    def _merge(self, time: float) -> None:
        """Steps that every island at work has told of: the mean over the islands, of tokens/s the sum."""
        at_work = self._islands - self._given_up
        while self._pending and at_work <= self._pending[step := min(self._pending)].keys():
            told = list(self._pending.pop(step).values())
            for tag in told[0]:
                total = sum(values[tag] for values in told)
                self._write(MERGED, tag, total if tag == _RATE else total / len(told), step, time)
            self._merged_step = step

    def _write(self, who: str, tag: str, value: float, step: int, time: float) -> None:
        if who not in self._writers:
            from tensorboard.summary import Writer

            self._writers[who] = Writer(str(self._folder / who))
        self._writers[who].add_scalar(tag, value, step, wall_time=time)
