"""Processes by their number, as /proc tells: whether they live, and since when.

Standard library only, and Python 3.9: this file travels to the sites. Linux only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A living process. Numbers are reused, starts are not: both together name it until the next boot."""

    pid: int
    parent: int
    start_ticks: int  # clock ticks from boot to its start

    @property
    def started(self) -> float:
        """Seconds since 1970, to the second or so."""
        lines = Path("/proc/stat").read_text().splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        return boot + self.start_ticks / os.sysconf("SC_CLK_TCK")


def process(pid: int) -> Process | None:
    """None when there is no such process, or only its record: it has ended and nobody has waited for it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # also where it ends while it is read
        return None
    state, parent, *rest = text.rpartition(")")[2].split()  # its name may hold blanks and brackets
    return None if state in "ZX" else Process(pid, int(parent), int(rest[17]))
