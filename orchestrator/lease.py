"""One coordinator per run (law 8): a lease in the store, renewed while the coordinator lives."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from clusters.processes import process
from orchestrator.store import Store

LEASE_SECONDS = 30.0
_POLL_SECONDS = 1.0


class LeaseLost(Exception):
    """Another coordinator has the run now: this one must do nothing more."""


@dataclass
class Lease:
    """The right to act for a run, held by this process."""

    store: Store
    run: str
    holder: str
    _renewed: float = field(default_factory=time.monotonic, init=False)

    def renew(self) -> None:
        """Keep the lease. Raises LeaseLost."""
        if time.monotonic() - self._renewed < LEASE_SECONDS / 3:
            return
        if not self.store.renew(self.run, self.holder, LEASE_SECONDS):
            raise LeaseLost(f"{self.run} is coordinated by {self.store.holder(self.run) or 'nobody'} now")
        self._renewed = time.monotonic()

    def release(self) -> None:
        self.store.release(self.run, self.holder)


def acquire(store: Store, run: str, waiting: Callable[[str], None]) -> Lease:
    """The lease of a run, as soon as its holder is gone; `waiting` hears once who holds it.

    A holder on this machine whose process is dead is not waited for. Raises LeaseLost when a live one
    keeps renewing.
    """
    me = identity()
    deadline = time.monotonic() + 2 * LEASE_SECONDS
    told = False
    while not store.acquire(run, me, LEASE_SECONDS):
        other = store.holder(run)
        if other and _dead(other):
            store.release(run, other)
            continue
        if other and not told:
            waiting(other)
            told = True
        if time.monotonic() > deadline:
            raise LeaseLost(f"{run} is coordinated by {other}; stop that one first")
        time.sleep(_POLL_SECONDS)
    return Lease(store, run, me)


def free(store: Store, run: str) -> bool:
    """Whether nobody alive holds the lease, as far as this machine can tell."""
    holder = store.holder(run)
    return holder is None or _dead(holder)


def identity() -> str:
    """This process: host, boot, pid and start, so that a reused pid is another holder."""
    pid = os.getpid()
    return f"{socket.gethostname()}/{_boot()}/{pid}/{_started(pid)}"


def _dead(holder: str) -> bool:
    """Whether a holder is known to be gone. On other machines only the lease's expiry tells."""
    host, boot, pid, started = holder.split("/")
    if host != socket.gethostname() or boot != _boot():
        return False
    return _started(int(pid)) != started


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> str:
    """Clock ticks from boot to the start of a process; empty when there is none."""
    found = process(pid)
    return str(found.start_ticks) if found else ""
