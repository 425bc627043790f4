"""A parent that has imported everything and touched no device, and forks the rank within milliseconds.

`python -P -m parallelism.nursery [--entry MODULE:FUNCTION]`, JSON lines on standard input and output:

    <- {"ready": seconds, "threads": 1}                  everything is imported
    -> {"start": {"env": {…}, "segment": "…", "log": "…"}}
    <- {"started": pid}                                  in a process group of its own, its output in the log
    -> {"kill": true}
    <- {"ended": pid, "exit_code": n or null, "signal": n or null, "time": seconds since 1970}

One rank at a time. "ended" is told when the last process of its group is gone. When the input ends, or the
nursery dies, the rank is killed. The entry is called with the segment's directory; what it returns is the
exit code, an exception is logged and gives 1.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

Entry = Callable[[Path], int]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NO_RANK = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the input ends. Raises ValueError when the entry is not MODULE:FUNCTION."""
    parser = argparse.ArgumentParser(prog="parallelism.nursery")
    parser.add_argument("--entry", default="parallelism.rank:main", metavar="MODULE:FUNCTION")
    arguments = parser.parse_args(argv)
    requests, answers = _own_the_protocol()
    _die_with(os.getppid())
    for asked in (signal.SIGTERM, signal.SIGINT):  # Slurm sends it to every process: the supervisor alone
        signal.signal(asked, signal.SIG_IGN)  # decides how to stop, and ranks must live to save a checkpoint
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads would not survive the fork
    entry = _load(arguments.entry)
    gc.collect()
    gc.freeze()  # or the rank's first collection would copy every page that holds an object
    nursery = Nursery(entry, requests, answers)
    nursery.tell(ready=time.monotonic() - started, threads=len([*Path("/proc/self/task").iterdir()]))
    nursery.serve()
    return 0


def _own_the_protocol() -> tuple[int, int]:
    """Keep input and output for the protocol: what libraries print goes to standard error."""
    requests, answers = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    return requests, answers


def _load(name: str) -> Entry:
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(f"--entry {name}: must be MODULE:FUNCTION")
    entry: Entry = getattr(importlib.import_module(module), function)
    return entry


class Nursery:
    """Serves the protocol; single-threaded, since a fork takes along only the thread that calls it."""

    def __init__(self, entry: Entry, requests: int, answers: int) -> None:
        self.entry, self.requests, self.answers = entry, requests, answers
        self.rank = _NO_RANK
        self.unread = b""
        self.woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing would be written to `wake`
        self.descriptors = (requests, answers, self.woken, wake)

    def tell(self, **message: Any) -> None:
        os.write(self.answers, json.dumps(message).encode() + b"\n")

    def serve(self) -> None:
        """Until the input ends; no rank is left then."""
        while True:
            readable, _, _ = select.select([self.requests, self.woken], [], [])
            if self.woken in readable:
                os.read(self.woken, 4096)
                self._bury()
            if self.requests in readable and not self._hear():
                break
        if self.rank != _NO_RANK:
            self._kill()
            _wait_for_end(self.rank)
            os.waitpid(self.rank, 0)

    def _hear(self) -> bool:
        """Obey what has arrived; False at the end of the input."""
        block = os.read(self.requests, 1 << 16)
        *lines, self.unread = (self.unread + block).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "start" in request:
                self._start(**request["start"])
            elif request.get("kill"):
                self._kill()
        return bool(block)

    def _start(self, env: dict[str, str], segment: str, log: str) -> None:
        assert self.rank == _NO_RANK, "one rank at a time"
        sys.stdout.flush()  # or the rank would print it again
        nursery = os.getpid()
        self.rank = os.fork()
        if self.rank == _NO_RANK:
            self._become_rank(nursery, env, Path(segment), log)
        _own_group(self.rank)  # here too: a kill may come before the rank has done it itself
        self.tell(started=self.rank)

    def _become_rank(self, nursery: int, env: dict[str, str], segment: Path, log: str) -> NoReturn:
        code = 1
        try:
            _own_group(0)
            _die_with(nursery)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in self.descriptors:
                os.close(descriptor)
            _log_to(log)
            os.environ.update(env)
            code = self.entry(segment)
        except SystemExit as end:
            code = _code_of(end)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not a return: the nursery's own way out is not the rank's

    def _kill(self) -> None:
        if self.rank != _NO_RANK:
            _kill_group(self.rank)

    def _bury(self) -> None:
        """If the rank has ended: end its group, and tell how it ended."""
        if self.rank == _NO_RANK or not os.waitid(os.P_PID, self.rank, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        ended = time.time()
        _wait_for_end(self.rank)
        _, status = os.waitpid(self.rank, 0)
        killed = os.WIFSIGNALED(status)
        self.tell(
            ended=self.rank,
            exit_code=None if killed else os.WEXITSTATUS(status),
            signal=os.WTERMSIG(status) if killed else None,
            time=ended,
        )
        self.rank = _NO_RANK


def _code_of(end: SystemExit) -> int:
    """As the interpreter reads it: a number, nothing for 0, or a message for 1."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    sys.stderr.write(f"{end.code}\n")
    return 1


def _wait_for_end(leader: int) -> None:
    """Kill the leader's group until the leader alone is left of it, dead.

    It is not buried before that: as long as it is there, its number cannot be given to another group.
    """
    _kill_group(leader)
    while any(pid != leader for pid in _group(leader)) or not _is_dead(leader):
        time.sleep(0.005)
        _kill_group(leader)


def _group(leader: int) -> list[int]:
    """The living members of a process group."""
    found = [int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit()]
    return [pid for pid in found if _stat(pid)[2:3] == [str(leader)] and not _is_dead(pid)]


def _is_dead(pid: int) -> bool:
    return _stat(pid)[0:1] in ([], ["Z"], ["X"])


def _stat(pid: int) -> list[str]:
    """State, parent, process group, … of a process; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _own_group(pid: int) -> None:
    try:
        os.setpgid(pid, pid)
    except (PermissionError, ProcessLookupError):
        return  # it has done so itself and gone on


def _log_to(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it was a pipe when Python started
    faulthandler.enable()  # a crash inside a library leaves a stack, too


def _die_with(parent: int) -> None:
    """SIGKILL when the thread that started us ends; at once if it has ended before we could ask."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
