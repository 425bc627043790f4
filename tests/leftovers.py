"""What a test has started and not ended: processes, listening ports, shared memory, runtime directories.

Other tests run on the same machine, so that nothing is compared wholesale. A test's processes carry a
marker of its own in their environment; what they hold is noted while they live, and looked for afterwards.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARKER = "EUROTRAIN_TEST"
RUNTIME = "EUROTRAIN_RUNTIME"
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Leftovers:
    """Start processes with `environment` added to theirs, `note` what they hold, end them, `assert_none`."""

    marker: str = field(default_factory=lambda: uuid.uuid4().hex)
    ports: set[int] = field(default_factory=set)
    runtimes: set[Path] = field(default_factory=set)
    shared_before: set[Path] = field(default_factory=lambda: set(SHARED_MEMORY.iterdir()))

    @property
    def environment(self) -> dict[str, str]:
        return {MARKER: self.marker}

    def processes(self) -> list[psutil.Process]:
        """Living processes of this test; a zombie is dead, though its parent has not buried it."""
        return [p for p in psutil.process_iter() if self._is_mine(p)]

    def note(self) -> list[psutil.Process]:
        """Remember the ports and runtime directories that the test's processes hold now."""
        mine = self.processes()
        pids = {p.pid for p in mine}
        listening = (c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN)
        self.ports |= {c.laddr.port for c in listening if c.pid in pids}
        self.runtimes |= {Path(value) for p in mine if (value := _environment(p).get(RUNTIME))}
        return mine

    def remaining(self) -> list[str]:
        """One line for each thing that is still there."""
        found = [f"process {p.pid} {_command(p)}" for p in self.processes()]
        listening = {c.laddr.port for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        found += [f"port {port} is listened on" for port in sorted(self.ports & listening)]
        found += [f"directory {path}" for path in sorted(self.runtimes) if path.exists()]
        fresh = set(SHARED_MEMORY.iterdir()) - self.shared_before
        return found + [f"shared memory {path}" for path in sorted(fresh) if not _in_use(path)]

    def assert_none(self, within: float = 5.0) -> float:
        """Seconds until nothing was left; AssertionError, naming what is, if that takes too long."""
        started = time.monotonic()
        while left := self.remaining():
            assert time.monotonic() < started + within, "left behind: " + "; ".join(left)
            time.sleep(0.05)
        return time.monotonic() - started

    def kill(self) -> None:
        """For a test that failed halfway."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for path in self.runtimes:
            shutil.rmtree(path, ignore_errors=True)

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return (
                process.status() != psutil.STATUS_ZOMBIE and _environment(process).get(MARKER) == self.marker
            )
        except psutil.NoSuchProcess:
            return False


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "(ended)"


def _in_use(path: Path) -> bool:
    """Whether a living process, whosever, has the file open or mapped: then it is not left behind."""
    try:
        target = path.stat()
    except OSError:
        return True  # gone
    for process in psutil.process_iter():
        for listing in (f"/proc/{process.pid}/map_files", f"/proc/{process.pid}/fd"):
            try:
                if any(_same(entry, target.st_ino, target.st_dev) for entry in Path(listing).iterdir()):
                    return True
            except OSError:
                continue
    return False


def _same(entry: Path, inode: int, device: int) -> bool:
    try:
        found = entry.stat()
    except OSError:
        return False
    return (found.st_ino, found.st_dev) == (inode, device)
