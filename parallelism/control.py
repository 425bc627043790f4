"""What the ranks of an island decide together: rank 0 looks at files and clocks, and tells the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clusters.events import EventWriter
from clusters.paths import SegmentPaths
from parallelism.device import COLLECTIVE_TIMEOUT, Device

T = TypeVar("T")

POLL_SECONDS = 0.1
# Ranks that wait for rank 0 wait in a collective: it speaks to them well before that gives up.
_SIGN_OF_LIFE_SECONDS = COLLECTIVE_TIMEOUT.total_seconds() / 30


class Control:
    """The default process group must exist. Every method is called by all ranks, in the same order."""

    def __init__(self, paths: SegmentPaths, device: Device) -> None:
        self.paths = paths
        self.device = device
        self.rank = dist.get_rank()
        self.ranks = dist.get_world_size()
        self.leads = self.rank == 0
        self.draining = False  # as of the last `sum` or `wait_for`: equal on all ranks
        self._events = EventWriter(paths.events / "ranks.jsonl") if self.leads else None

    def tell(self, kind: str, **facts: object) -> None:
        """Log an event of clusters.events; rank 0 does."""
        if self._events is not None:
            self._events.emit(kind, **facts)

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, in fp64. Carries rank 0's view of the drain marker along."""
        drain = float(self.leads and self.paths.drain.exists())
        totals = torch.tensor([*values, drain], dtype=torch.float64, device=self.device.torch)
        dist.all_reduce(totals)
        *sums, drains = totals.tolist()
        self.draining = drains > 0
        return sums

    def from_leader(self, look: Callable[[], T]) -> T:
        """What `look` returns on rank 0. Raises there what it raises; the others then wait to be killed."""
        found = [look() if self.leads else None]
        dist.broadcast_object_list(found, src=0, device=self.device.torch)
        return found[0]  # type: ignore[return-value]

    def gather(self, mine: T) -> list[T]:
        """What each rank gives, by rank."""
        given: list[Any] = [None] * self.ranks
        dist.all_gather_object(given, mine)
        return given

    def first_problem(self, problem: str | None) -> str | None:
        """What the lowest rank with a problem says: None when no rank has one."""
        return next((p for p in self.gather(problem) if p is not None), None)

    def wait_for(self, arrived: Callable[[], bool], seconds: float) -> bool:
        """Whether something arrived within so many seconds; the wait ends early when the segment drains."""
        deadline = time.monotonic() + seconds
        while True:
            there, self.draining, over = self.from_leader(lambda: self._look(arrived, deadline))
            if there or self.draining or over:
                return there

    def _look(self, arrived: Callable[[], bool], deadline: float) -> tuple[bool, bool, bool]:
        """(it is there, the segment drains, the time is over): as soon as one is so, or as a sign of life."""
        pause = time.monotonic() + _SIGN_OF_LIFE_SECONDS
        while True:
            seen = arrived(), self.paths.drain.exists(), time.monotonic() >= deadline
            if any(seen) or time.monotonic() >= pause:
                return seen
            time.sleep(POLL_SECONDS)
