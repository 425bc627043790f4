"""A slot without Ray: what it does to its nursery and its rank. With Ray: test_supervisor.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import slot as slots
from orchestrator.slot import Slot, _until_gone
from tests.leftovers import MARKER, Leftovers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Leftovers]:
    watch = Leftovers()
    monkeypatch.setenv(MARKER, watch.marker)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    yield watch
    watch.kill()


def with_slot(
    tmp_path: Path, leftovers: Leftovers, entry: str, act: Callable[[Slot], Awaitable[None]]
) -> None:
    """Let `act` use a slot whose nursery is ready; then end the nursery as the slot's death would."""

    async def run() -> None:
        slot = Slot(f"fake_ranks:{entry}", str(tmp_path / "rank.log"), "127.0.0.1", [])
        await slot._start_nursery()
        await act(slot)
        assert slot.nursery is not None
        assert slot.nursery.stdin is not None
        slot.nursery.stdin.close()
        await slot.nursery.wait()
        await slot.listening

    asyncio.run(run())
    leftovers.assert_none()


async def start(slot: Slot, folder: Path) -> int:
    (folder / "ready").unlink(missing_ok=True)
    pid = await slot.start({}, str(folder))
    while not (folder / "ready").exists():
        await asyncio.sleep(0.01)
    return pid


def test_a_slot_starts_kills_and_tells(tmp_path: Path, leftovers: Leftovers) -> None:
    async def act(slot: Slot) -> None:
        await slot.kill()  # nothing to kill
        for _ in range(2):
            pid = await start(slot, tmp_path)
            await slot.kill()
            ended = await slot.ended()
            assert (ended["pid"], ended["exit_code"], ended["signal"]) == (pid, None, signal.SIGKILL)
            assert ended["note"] == ""
        await start(slot, tmp_path)
        (tmp_path / "go").touch()
        assert (await slot.ended())["exit_code"] == 0

    with_slot(tmp_path, leftovers, "family", act)


def test_a_nursery_that_does_not_obey_is_killed_with_its_rank(
    tmp_path: Path, leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "GONE_WITHIN", 1.0)

    async def act(slot: Slot) -> None:
        pid = await start(slot, tmp_path)
        assert slot.nursery is not None
        os.kill(slot.nursery.pid, signal.SIGSTOP)
        asked = time.monotonic()
        await slot.kill()
        ended = await slot.ended()
        assert 0.5 <= time.monotonic() - asked < 3
        assert ended["note"] == "was lost: its nursery died"
        family = [pid, int((tmp_path / "child").read_text())]
        assert not [member for member in family if slots._alive(member)]

    with_slot(tmp_path, leftovers, "family", act)


def test_after_its_nursery_died_a_slot_starts_another(tmp_path: Path, leftovers: Leftovers) -> None:
    async def act(slot: Slot) -> None:
        await start(slot, tmp_path)
        assert slot.nursery is not None
        slot.nursery.kill()
        assert (await slot.ended())["note"] == "was lost: its nursery died"
        with pytest.raises(RuntimeError, match=r"its nursery died \(exit code -9\)"):
            await slot.start({}, str(tmp_path))
        await slot._start_nursery()
        await start(slot, tmp_path)

    with_slot(tmp_path, leftovers, "family", act)


def test_a_nursery_that_cannot_import_is_reported_with_its_log(tmp_path: Path, leftovers: Leftovers) -> None:
    async def run() -> None:
        slot = Slot("no_such_module:main", str(tmp_path / "rank.log"), "127.0.0.1", [])
        with pytest.raises(RuntimeError, match=r"its nursery died \(exit code 1\)"):
            await slot._start_nursery()
        await slot.listening

    asyncio.run(run())
    assert "No module named 'no_such_module'" in (tmp_path / "rank.log").read_text()


def test_the_nursery_does_not_inherit_rays_environment(tmp_path: Path, leftovers: Leftovers) -> None:
    async def act(slot: Slot) -> None:
        assert slot.nursery is not None
        environment = psutil.Process(slot.nursery.pid).environ()
        assert environment[MARKER] == leftovers.marker
        assert "RAY_AUTH_TOKEN_PATH" not in environment

    with_slot(tmp_path, leftovers, "family", act)


@pytest.mark.parametrize("seconds", [0.2, 60])
def test_a_predecessors_processes_are_waited_for(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GONE_WITHIN", 1.5)
    process: Any = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    waiting = _until_gone([process.pid])
    if seconds < 1:
        asyncio.run(waiting)  # dead, though nobody has buried it
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    else:
        with pytest.raises(RuntimeError, match=rf"processes \[{process.pid}\] of its predecessor do not end"):
            asyncio.run(waiting)
    process.kill()
    process.wait()
