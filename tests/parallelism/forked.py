"""Ranks for tests: forked from this process, which has imported everything: a case takes about a second."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Function = Callable[..., Any]


class Ranks:
    """Runs a function on several ranks at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: dict[int, int] = {}  # pid: rank
        self.calls = 0

    def run(self, count: int, function: Function, *arguments: Any) -> list[Any]:
        """What the function returned on each rank; AssertionError with a rank's output when one failed."""
        self.start(count, function, *arguments)
        return self.results()

    def results(self, meanwhile: Callable[[], object] = lambda: None) -> list[Any]:
        """What `run` returns, for ranks that were started."""
        ends = self.wait(meanwhile)
        failed = [rank for rank, code in sorted(ends.items()) if code != 0]
        assert not failed, f"ranks {failed} ended with {ends}:\n" + "\n".join(map(self.log, failed))
        return [pickle.loads((self.place / f"{rank}.result").read_bytes()) for rank in sorted(ends)]

    def log(self, rank: int = 0) -> str:
        """The end of what a rank printed."""
        return (self.place / f"{rank}.log").read_text()[-4000:]

    def start(self, count: int, function: Function, *arguments: Any) -> None:
        """Start the ranks and return at once."""
        self.calls += 1
        self.place = self.directory / f"ranks-{self.calls}"
        self.place.mkdir(parents=True)
        port = _free_port()
        for rank in range(count):
            if (pid := os.fork()) == 0:
                _be(rank, count, port, self.place, function, arguments)
            self.running[pid] = rank

    def wait(self, meanwhile: Callable[[], object] = lambda: None, seconds: float = 240.0) -> dict[int, int]:
        """How each rank ended (-n: by signal n). All are killed soon after one has failed."""
        ends: dict[int, int] = {}
        deadline = time.monotonic() + seconds
        while self.running:
            for pid, rank in [*self.running.items()]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ends[rank] = os.waitstatus_to_exitcode(status)
                    del self.running[pid]
            if any(ends.values()):
                deadline = min(deadline, time.monotonic() + 5.0)
            if time.monotonic() > deadline:
                self.kill()
            meanwhile()
            time.sleep(0.01)
        return ends

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank, or all."""
        for pid, number in self.running.items():
            if rank in (None, number):
                os.kill(pid, signal.SIGKILL)


def _be(
    rank: int, count: int, port: int, place: Path, function: Function, arguments: tuple[Any, ...]
) -> NoReturn:
    code = 1
    try:
        log = os.open(place / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w")  # pytest has put its own in their place
        signal.alarm(0)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1"
        )
        os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", EUROTRAIN_GENERATION="1")
        result = function(*arguments)
        (place / f"{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
