"""Times in which a site, or a part of it, runs no jobs: its own reservations, and what the operator knows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Mapping  # noqa: UP035 - Python 3.9 at the sites


@dataclass(frozen=True)
class Window:
    """Seconds since 1970. `by_slurm`: Slurm itself lets no job run into it."""

    start: float
    end: float
    name: str
    by_slurm: bool = False

    def __str__(self) -> str:
        first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(t)) for t in (self.start, self.end))
        return f"{self.name} from {first} to {last}"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Window:
        """What the agent told. Raises ValueError."""
        start, end = float(raw["start"]), float(raw["end"])
        return cls(start, end, str(raw["name"]), by_slurm=True)


def parse_window(text: str) -> Window:
    """ "2026-12-01T08:00+01:00/2026-12-01T18:00+01:00", as ISO 8601 writes intervals. Raises ValueError."""
    first, slash, last = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} has no /")
    start, end = _moment(first), _moment(last)
    if end <= start:
        raise ValueError(f"{text!r} ends before it begins")
    return Window(start, end, "maintenance")


def _moment(text: str) -> float:
    """An operator's clock and the site's differ: without an offset nobody knows which one was meant."""
    told = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    if told.tzinfo is None:
        raise ValueError(f"{text!r} has no offset such as +01:00")
    return told.timestamp()
