"""Files appended at a site by sftp: several lanes over one connection, watched while they go.

OpenSSH gives one channel a window of 2 MiB, so that a lane carries at most 2 MiB per round trip (65 MB/s at
30 ms); several lanes fill a wider line. How far each is, the kernel knows: where sftp reads its file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Callable  # noqa: UP035 - Python 3.9 syntax, as in the whole room

from clusters.connection import Parcel, Unreachable
from clusters.ssh_session import Session

LANES = 4
SLOWEST = 125_000.0  # bytes per second below which a transfer is given up, to be resumed
_LOOK_SECONDS = 0.5
_BITS = 1000 // 8  # bytes per kbit, in which sftp counts
# An sftp that outlives us would append beside the one that resumes: it dies with us (PR_SET_PDEATHSIG, 9).
_TIED = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9);os.execvp(sys.argv[1],sys.argv[1:])"
    if sys.platform == "linux"
    else "import os,sys;os.execvp(sys.argv[1],sys.argv[1:])"
)


class Lane:
    """Files that one execution of sftp appends, one after the other."""

    def __init__(self, parcels: Sequence[Parcel]) -> None:
        self.parcels = list(parcels)
        self.pid = 0
        self.at = (0, 0)  # the parcel it is at, and how far
        self.finished = False

    def batch(self, quoted: Callable[[str], str], scratch: str) -> bytes:
        lines = [f"put -a {quoted(str(p.source))} {quoted(f'{scratch}/{p.part}')}" for p in self.parcels]
        return ("\n".join(lines) + "\n").encode()

    @property
    def size(self) -> int:
        return sum(p.size - p.have for p in self.parcels)

    def done(self) -> int:
        """Bytes that sftp has read so far: on their way, or there."""
        if self.finished:
            return self.size
        self.at = max(self.at, self._position() or (0, 0))
        number, position = self.at
        before = sum(p.size - p.have for p in self.parcels[:number])
        return before + max(0, position - self.parcels[number].have)

    def _position(self) -> tuple[int, int] | None:
        """Which parcel sftp has open, and where it reads; None where the kernel does not tell."""
        names = {str(p.source.resolve()): number for number, p in enumerate(self.parcels)}
        try:
            for entry in Path(f"/proc/{self.pid}/fd").iterdir():
                number = names.get(str(entry.readlink()))
                if number is not None:
                    text = Path(f"/proc/{self.pid}/fdinfo/{entry.name}").read_text()
                    return number, int(text.split()[1])
        except (OSError, ValueError, IndexError):
            return None
        return None


def lanes(parcels: Sequence[Parcel], count: int = LANES) -> list[Lane]:
    """The largest first, each to the lane with the least to carry."""
    loads: list[list[Parcel]] = [[] for _ in range(min(count, len(parcels)))]
    for parcel in sorted(parcels, key=lambda p: p.have - p.size):
        min(loads, key=lambda load: sum(p.size - p.have for p in load)).append(parcel)
    return [Lane(load) for load in loads]


def upload(
    session: Session,
    scratch: str,
    parcels: Sequence[Parcel],
    progress: Callable[[int], None],
    bandwidth: int,
    quoted: Callable[[str], str],
) -> None:
    """Raises Unreachable: what sftp said. All lanes have ended when this returns."""
    made = lanes(parcels)
    limit = max(1, bandwidth // _BITS // len(made)) if bandwidth else 0

    def run(lane: Lane) -> None:
        words = [sys.executable, "-ISc", _TIED, "sftp", "-q", *(["-l", str(limit)] if limit else [])]
        words += [*session.options(), "-b", "-", session.alias]
        patience = 60.0 + lane.size / min(SLOWEST, limit * _BITS / 2 or SLOWEST)
        batch = lane.batch(quoted, scratch)
        done = session.run(words, batch, patience, lambda pid: setattr(lane, "pid", pid))
        if done.code:
            lines = done.errors.strip().splitlines()[-1:] or [f"exit code {done.code}"]
            raise Unreachable(f"{session.alias}: sftp: {lines[0][:300]}")
        lane.finished = True

    with ThreadPoolExecutor(len(made), thread_name_prefix="lane") as pool:
        flying = {pool.submit(run, made[0])}
        _wait_until_shared(session, flying)
        flying |= {pool.submit(run, lane) for lane in made[1:]}
        failed = _watch(flying, made, progress)
    if failed:
        raise failed[0]


def _wait_until_shared(session: Session, first: set[Future[None]]) -> None:
    """The first lane opens the connection that the others share: all at once would open one each."""
    while not session.is_live() and not wait(first, timeout=0.05).done:
        pass


def _watch(
    flying: set[Future[None]], made: Sequence[Lane], progress: Callable[[int], None]
) -> list[BaseException]:
    failed: list[BaseException] = []
    while flying:
        done, flying = wait(flying, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
        failed += [error for future in done if (error := future.exception())]
        progress(sum(lane.done() for lane in made))
    return failed
