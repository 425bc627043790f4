"""A node's energy counters as Cray EX machines (LUMI) have them, under /sys/cray/pm_counters.

The power is what a file says, in watts, 500 where there is none: tests turn it up and down.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.testbed import namespaces

COUNTERS = Path("/sys/cray/pm_counters")
_IDLE_WATTS = 500.0
_STEP_SECONDS = 0.5


def start(power: Path) -> None:
    """Fork the counters' process, when they can be read."""
    _room_in_sys()
    write(0.0, _IDLE_WATTS)
    if os.fork() == 0:
        count(power)


def _room_in_sys() -> None:
    """sysfs takes no new directories: build another /sys of the old one's parts, and mount it over."""
    other = Path("/run/sys")
    other.mkdir()
    namespaces.tmpfs(other)
    for part in Path("/sys").iterdir():
        (other / part.name).mkdir()
        namespaces.bind(part, other / part.name)
    (other / "cray/pm_counters").mkdir(parents=True)
    namespaces.mount(str(other), "/sys", flags=namespaces.MS_MOVE)


def count(power: Path) -> None:
    joules, before = 0.0, time.time()
    while True:
        time.sleep(_STEP_SECONDS)
        now, watts = time.time(), watts_of(power)
        joules += watts * (now - before)
        before = now
        write(joules, watts)


def watts_of(power: Path) -> float:
    try:
        return float(power.read_text())
    except (FileNotFoundError, ValueError):
        return _IDLE_WATTS


def write(joules: float, watts: float, folder: Path = COUNTERS) -> None:
    stamp = f"{time.time() * 1e6:.0f} us"
    for name, text in (("energy", f"{joules:.0f} J {stamp}\n"), ("power", f"{watts:.0f} W {stamp}\n")):
        new = folder / f"{name}.new"
        new.write_text(text)
        new.replace(folder / name)
