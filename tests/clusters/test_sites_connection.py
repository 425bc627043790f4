"""A real site's SSH: one execution per exchange, sessions that break or expire, files gone on with."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.connection import Unreachable
from tests.clusters.site_on_bed import SCRATCH, SiteOnBed

pytestmark = pytest.mark.slurm


def test_an_exchange_is_one_execution_of_ssh(site: SiteOnBed) -> None:
    site.connection.exchange([])
    before, connections = site.executions, site.connections
    for number in range(5):
        keys = ["one", "two", f"none-{number}"]
        look = {"op": "jobs", "scheduler": "slurm", "keys": keys}
        site.connection.exchange([look, {"op": "events", "since": {key: {} for key in keys}}, look])
    assert site.executions - before == 5
    assert site.connections == connections


def test_a_poll_takes_little_longer_than_squeue_by_hand(
    site: SiteOnBed, capsys: pytest.CaptureFixture[str]
) -> None:
    session = site.connection.session
    bare = ["ssh", *session.options(), "-T", "south", "squeue --me"]
    look = [{"op": "jobs", "scheduler": "slurm", "keys": ["one", "two"]}]
    took: dict[str, list[float]] = {"bare ssh squeue": [], "poll": []}
    for _ in range(9):
        began = time.monotonic()
        subprocess.run(bare, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        middle = time.monotonic()
        site.connection.exchange(look)
        took["bare ssh squeue"].append(middle - began)
        took["poll"].append(time.monotonic() - middle)
    with capsys.disabled():
        for name, seconds in took.items():
            print(
                f"\n{name}: median {statistics.median(seconds):.3f} s, {min(seconds):.3f}-{max(seconds):.3f}"
            )
    assert statistics.median(took["poll"]) < statistics.median(took["bare ssh squeue"]) + 1.0


def test_a_session_whose_owner_was_killed(site: SiteOnBed) -> None:
    site.connection.exchange([])
    os.kill(site.session_pid, signal.SIGKILL)
    path = site.connection.session.control_path()
    deadline = time.monotonic() + 10
    while site.connection.session.is_live():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert path.is_socket(), "left behind"
    assert site.connection.exchange([]) == []
    assert site.connection.session.is_live()


def test_an_expired_session_is_told_and_not_knocked_at(site: SiteOnBed) -> None:
    keys = site.bed.directory / "south" / "ssh" / "authorized_keys"
    allowed = keys.read_text()
    site.connection.session.close()
    wait_until_dead(site)
    keys.write_text("")
    try:
        for _ in range(4):
            with pytest.raises(
                Unreachable, match=r"south: .*Permission denied \(publickey\)\.; type `ssh .* south`"
            ):
                site.connection.exchange([])
        before = site.connections
        with pytest.raises(Unreachable, match="Permission denied"):
            site.connection.exchange([])
        assert site.connections == before, "nobody knocks again"
    finally:
        keys.write_text(allowed)
    with pytest.raises(Unreachable, match="Permission denied"):
        site.connection.exchange([])
    remedy = site.connection.session.remedy().removeprefix("type `").removesuffix("`")
    subprocess.run(
        remedy.split(), check=True, timeout=30, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert site.connection.exchange([]) == []
    assert site.connection.session.budget.read().refused == ""


def wait_until_dead(site: SiteOnBed) -> None:
    deadline = time.monotonic() + 10
    while site.connection.session.is_live():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_site_behind_a_cut_link_is_given_up_in_time(site: SiteOnBed) -> None:
    site.connection.exchange([])
    with site.bed.partition("south"):
        began = time.monotonic()
        with pytest.raises(Unreachable, match="south: no answer within 2 s"):
            site.connection.exchange([], timeout=2.0)
        assert time.monotonic() - began < 4
    assert site.connection.exchange([], timeout=30.0) == [], "the session has survived"


def test_a_shell_that_greets_does_no_harm(site: SiteOnBed) -> None:
    site.shell("printf 'echo Welcome to south\\necho Maintenance on Monday >&2\\n' > .bashrc")
    try:
        assert site.job("never")["state"] == "absent"
    finally:
        site.shell("rm .bashrc")


# ---- files


@pytest.fixture
def slow(site: SiteOnBed) -> Iterator[None]:
    site.connection.exchange([])
    site.bed.wan({"rate_mbit": 40.0, "delay_ms": 5.0, "queue_ms": 2000.0})
    yield
    site.bed.wan()


@pytest.mark.usefixtures("slow")
def test_a_broken_push_is_gone_on_with(site: SiteOnBed, tmp_path: Path) -> None:
    content = os.urandom(12 << 20)
    (tmp_path / "up load").write_bytes(content)
    incoming = site.bed.directory / "south/scratch/eurotrain/incoming"
    with break_session_when_grown(site, incoming), pytest.raises(Unreachable):
        site.connection.push(tmp_path / "up load", "in/box/up load")
    left = int(site.shell(f"stat -c %s {SCRATCH}/incoming/*.part"))
    assert 0 < left < len(content)
    began = received(site)
    assert site.connection.push(tmp_path / "up load", "in/box/up load") == len(content)
    assert received(site) - began < len(content), "what was there was not sent again"
    assert left > 2 << 20, "more than what the headers and a packet sent twice add"
    told = site.shell(f"sha256sum < '{SCRATCH}/in/box/up load'; ls -A {SCRATCH}/incoming '{SCRATCH}/in/box'")
    assert told.split()[0] == subprocess.run(
        ["sha256sum", tmp_path / "up load"], capture_output=True, text=True, check=True
    ).stdout.split()[0].lstrip("\\")
    assert told.count("up load") == 1
    assert ".part" not in told


@pytest.mark.usefixtures("slow")
def test_a_broken_fetch_is_gone_on_with(site: SiteOnBed, tmp_path: Path) -> None:
    site.shell(f"head -c 12M /dev/urandom > '{SCRATCH}/do[w]n \"load'")
    with break_session_when_grown(site, tmp_path / "down"), pytest.raises(Unreachable):
        site.connection.fetch('do[w]n "load', tmp_path / "down" / "file")
    (part,) = (tmp_path / "down").iterdir()
    left = part.stat().st_size
    assert 0 < left < 12 << 20
    inode = part.stat().st_ino
    assert site.connection.fetch('do[w]n "load', tmp_path / "down" / "file") == 12 << 20
    assert (tmp_path / "down" / "file").stat().st_ino == inode
    assert [p.name for p in (tmp_path / "down").iterdir()] == ["file"]
    site.shell(f"rm '{SCRATCH}/do[w]n \"load'")


@contextlib.contextmanager
def break_session_when_grown(site: SiteOnBed, folder: Path) -> Iterator[None]:
    """Kill the shared session in the middle of a transfer; afterwards wait until there may be another."""
    pid, done = site.session_pid, threading.Event()

    def kill() -> None:
        while not done.wait(0.02):
            if any(part.stat().st_size > 3 << 20 for part in folder.glob("*") if part.name.endswith(".part")):
                os.kill(pid, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    done.set()
    killer.join()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not site.connection.session.is_live():
        with contextlib.suppress(Unreachable):  # the pause after a failure
            site.connection.exchange([])
        time.sleep(0.2)


def received(site: SiteOnBed) -> int:
    """Bytes that the site has received over the WAN."""
    return int(site.bed.root("south", "login", "cat", "/proc/net/dev").stdout.split("wan0:")[1].split()[0])


def test_a_push_that_arrives_damaged_is_not_taken(site: SiteOnBed, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(content)
    name = subprocess.run(
        ["sha256sum", tmp_path / "file"], capture_output=True, text=True, check=True
    ).stdout[:64]
    site.shell(f"mkdir -p {SCRATCH}/incoming; head -c 1000 /dev/zero > {SCRATCH}/incoming/{name}.part")
    with pytest.raises(Unreachable, match="south: receive: file has arrived damaged"):
        site.connection.push(tmp_path / "file", "file")
    assert site.shell(f"ls {SCRATCH}/file", check=False) == ""
    assert site.connection.push(tmp_path / "file", "file") == 1 << 20
