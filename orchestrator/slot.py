"""One rank's place on its node: owns a nursery, and through it one rank at a time.

Lives there as an actor of Ray, of which it knows nothing itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from orchestrator.address import interface_of

GONE_WITHIN = 10.0  # seconds from SIGKILL until a process must have left the process table


class Slot:
    """`address`: of its node, for the ranks on other nodes."""

    def __init__(self, entry: str, log: str, address: str, predecessors: Sequence[int]) -> None:
        self.entry, self.log, self.address, self.predecessors = entry, log, address, predecessors
        self.nursery: asyncio.subprocess.Process | None = None
        self.pid = 0
        self.answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.ending: asyncio.Future[dict[str, Any]] | None = None

    async def prepare(self) -> dict[str, Any]:
        """What a rank here can be reached by, once its nursery has imported everything and no process of a
        predecessor is left. The port is one that nobody listened on a moment ago."""
        await _until_gone(self.predecessors)
        if self.nursery is None or self.nursery.returncode is not None:
            await self._start_nursery()
        assert self.nursery is not None
        with socket.socket() as probe:
            probe.bind((self.address, 0))
            port = probe.getsockname()[1]
        return {"port": port, "interface": interface_of(self.address), "nursery": self.nursery.pid}

    async def start(self, env: dict[str, str], segment: str) -> int:
        """The rank's process id."""
        self.ending = asyncio.get_running_loop().create_future()
        self._ask(start={"env": env, "segment": segment, "log": self.log})
        self.pid = int((await self._answer())["started"])
        return self.pid

    async def ended(self) -> dict[str, Any]:
        """How the rank ended, when it has."""
        assert self.ending is not None
        return await asyncio.shield(self.ending)

    async def kill(self) -> None:
        """Kill the rank, if there is one. A nursery that does not obey is killed too."""
        if self.ending is None or self.ending.done():
            return
        self._ask(kill=True)
        done, _ = await asyncio.wait([self.ending], timeout=GONE_WITHIN / 2)
        if not done:
            assert self.nursery is not None
            self.nursery.kill()

    async def _start_nursery(self) -> None:
        """In a session of its own, without what Ray has put into our environment (its token is no rank's)."""
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONBREAK"))
        }
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(self.log).open("ab") as errors:
            self.nursery = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "parallelism.nursery", "--entry", self.entry),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=own,
                start_new_session=True,
            )
        self.answers = asyncio.Queue()
        self.listening = asyncio.create_task(self._listen(self.nursery))
        await self._answer()

    async def _listen(self, nursery: asyncio.subprocess.Process) -> None:
        assert nursery.stdout is not None
        while line := await nursery.stdout.readline():
            answer = json.loads(line)
            if "ended" in answer:
                self._end(answer["exit_code"], answer["signal"], answer["time"])
            else:
                self.answers.put_nowait(answer)
        await nursery.wait()
        self.answers.put_nowait(None)
        if self.ending is not None and not self.ending.done():
            await _until_gone(_kill_group(self.pid))  # the kernel kills the rank itself, nobody its children
            self._end(None, None, time.time(), note="was lost: its nursery died")

    def _end(self, exit_code: int | None, by: int | None, when: float, note: str = "") -> None:
        assert self.ending is not None
        self.ending.set_result(
            {"pid": self.pid, "exit_code": exit_code, "signal": by, "time": when, "note": note}
        )

    def _ask(self, **request: Any) -> None:
        assert self.nursery is not None
        assert self.nursery.stdin is not None
        self.nursery.stdin.write(json.dumps(request).encode() + b"\n")

    async def _answer(self) -> dict[str, Any]:
        answer = await self.answers.get()
        if answer is None:
            assert self.nursery is not None
            raise RuntimeError(f"its nursery died (exit code {self.nursery.returncode})")
        return answer


async def _until_gone(pids: Sequence[int]) -> None:
    """Raises RuntimeError when one of them is still there after GONE_WITHIN seconds."""
    deadline = time.monotonic() + GONE_WITHIN
    while left := [pid for pid in pids if _alive(pid)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} of its predecessor do not end")
        await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill_group(leader: int) -> list[int]:
    """The processes that were in the group."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == leader:
                members.append(pid)
                os.kill(pid, signal.SIGKILL)
    return members
