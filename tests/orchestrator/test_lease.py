"""One coordinator per run: a live one is waited for, a dead one is replaced at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import lease
from orchestrator.lease import Lease, LeaseLost, acquire, free, identity
from orchestrator.store import Store

RUN = "run"
ELSEWHERE = "login7.far.away/boot/123/456"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "eurotrain.db")
    yield store
    store.close()


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.02)


def nobody(holder: str) -> None:
    raise AssertionError(f"waited for {holder}")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A living process, and its identity."""
    code = "import time, orchestrator.lease as l; print(l.identity(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_a_free_run_is_coordinated_at_once(store: Store) -> None:
    assert free(store, RUN)
    held = acquire(store, RUN, nobody)
    assert (held.holder, store.holder(RUN)) == (identity(), identity())
    assert not free(store, RUN)
    held.release()
    assert store.holder(RUN) is None
    assert free(store, RUN)


def test_a_process_may_take_its_own_lease_again(store: Store) -> None:
    acquire(store, RUN, nobody)
    assert acquire(store, RUN, nobody).holder == identity()


def test_runs_have_leases_of_their_own(store: Store) -> None:
    store.acquire("another", ELSEWHERE, 60.0)
    acquire(store, RUN, nobody)


# ---- other holders


def test_a_holder_elsewhere_is_waited_for_and_then_left_alone(store: Store) -> None:
    store.acquire(RUN, ELSEWHERE, 60.0)
    began, told = time.monotonic(), list[str]()
    with pytest.raises(LeaseLost, match=f"run is coordinated by {ELSEWHERE}; stop that one first"):
        acquire(store, RUN, told.append)
    assert time.monotonic() - began >= 1.2  # twice as long as a lease lasts: it has been renewed
    assert told == [ELSEWHERE]
    assert store.holder(RUN) == ELSEWHERE
    assert not free(store, RUN)


def test_a_holder_elsewhere_that_renews_no_longer_is_replaced_when_its_lease_ends(store: Store) -> None:
    store.acquire(RUN, ELSEWHERE, 0.3)
    began, told = time.monotonic(), list[str]()
    acquire(store, RUN, told.append)
    assert time.monotonic() - began >= 0.25
    assert told == [ELSEWHERE]
    assert store.holder(RUN) == identity()


def test_a_living_holder_on_this_machine_is_waited_for(
    store: Store, other: tuple[subprocess.Popen[str], str]
) -> None:
    _, holder = other
    store.acquire(RUN, holder, 60.0)
    assert not free(store, RUN)
    with pytest.raises(LeaseLost):
        acquire(store, RUN, lambda _: None)
    assert store.holder(RUN) == holder


@pytest.mark.parametrize("buried", [True, False], ids=["gone", "zombie"])
def test_a_dead_holder_on_this_machine_is_replaced_at_once(
    store: Store, other: tuple[subprocess.Popen[str], str], buried: bool
) -> None:
    process, holder = other
    store.acquire(RUN, holder, 60.0)
    process.kill()
    if buried:
        process.wait()
    while not free(store, RUN):
        time.sleep(0.001)
    acquire(store, RUN, nobody)
    assert store.holder(RUN) == identity()


# ---- identity


def test_an_identity_names_host_boot_pid_and_start(other: tuple[subprocess.Popen[str], str]) -> None:
    host, boot, pid, started = identity().split("/")
    assert (host, int(pid)) == (socket.gethostname(), os.getpid())
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert identity() == identity()
    _, _, _, started_later = other[1].split("/")
    assert 0 < int(started) < int(started_later)


@pytest.mark.parametrize(
    ("changes", "is_free"),
    [
        ({}, False),
        ({3: "1"}, True),  # the pid was given to another process since
        ({2: "4194304"}, True),  # above the largest pid: nobody has it
        ({1: "an-earlier-boot", 2: "4194304"}, False),  # not this boot: only the lease's end tells
        ({0: "login7", 3: "1"}, False),
    ],
    ids=["itself", "reused pid", "no such process", "another boot", "another host"],
)
def test_who_is_known_to_be_dead(store: Store, changes: dict[int, str], is_free: bool) -> None:
    holder = "/".join(changes.get(n, part) for n, part in enumerate(identity().split("/")))
    store.acquire(RUN, holder, 60.0)
    assert free(store, RUN) is is_free


# ---- renewal


class Clock:
    """Stands in for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_lease_is_renewed_when_a_third_of_it_is_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every call: each is a write to the database."""
    clock, renewals = Clock(), list[tuple[str, str, float]]()
    monkeypatch.setattr(lease, "time", clock)

    def renew(run: str, holder: str, seconds: float) -> bool:
        renewals.append((run, holder, seconds))
        return True

    monkeypatch.setattr(store, "renew", renew)
    held = Lease(store, RUN, identity())
    held._renewed = clock.now
    for wait, expected in ((0.0, 0), (0.19, 0), (0.02, 1), (0.0, 1), (0.19, 1), (0.02, 2)):
        clock.now += wait
        held.renew()
        assert renewals == [(RUN, identity(), 0.6)] * expected


def test_a_renewed_lease_lasts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    held = acquire(store, RUN, nobody)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    held._renewed -= 20.0
    held.renew()
    time.sleep(0.65)  # longer than it was acquired for
    assert store.holder(RUN) == identity()


@pytest.mark.parametrize(("successor", "who"), [(ELSEWHERE, ELSEWHERE), (None, "nobody")])
def test_a_lost_lease_is_noticed(store: Store, successor: str | None, who: str) -> None:
    held = acquire(store, RUN, nobody)
    store.release(RUN, held.holder)
    if successor:
        store.acquire(RUN, successor, 60.0)
    time.sleep(0.21)
    with pytest.raises(LeaseLost, match=f"run is coordinated by {who} now"):
        held.renew()


def test_releasing_leaves_the_lease_of_another_alone(store: Store) -> None:
    held = acquire(store, RUN, nobody)
    store.release(RUN, held.holder)
    store.acquire(RUN, ELSEWHERE, 60.0)
    held.release()
    assert store.holder(RUN) == ELSEWHERE
