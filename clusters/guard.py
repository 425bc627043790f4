"""Owns everything a segment starts, so that nothing of it is left however it ends.

`python -P -m clusters.guard [--time-limit S] [--grace S] [--die-with-parent] [--node] SEGMENT_DIR -- words …`

    guard ── command (the supervisor; killed by the kernel if the guard dies) ── Ray, nurseries, ranks …
      └───── janitor (does nothing until the guard is killed; then does what the guard no longer can)

The guard is the reaper of all its descendants, so that those which daemonise stay within reach. When the
command ends it kills whatever is left. SIGTERM, SIGINT, SIGHUP and the time limit reach the command as
SIGTERM; after the grace period, or at a second signal, everything is killed. How it ended is written to
exit.json: `start`, `end` (seconds since 1970), `exit_code` (128 + n for signal n, as shells count),
`outcome`: completed, failed, timeout or cancelled. On a local site this is the accounting record.

A segment of several nodes has a guard on each. With `--node` it is not the one of the supervisor's node: it
hands its standard input to the command, logs to node-HOST.log, and its end is not the segment's.

Standard library only, and Python 3.9: this file travels to sites with an old interpreter. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters.paths import SegmentPaths, write_atomically
from clusters.runtimes import make_runtime, sweep

RUNTIME = "EUROTRAIN_RUNTIME"  # the command's own directory under /tmp: short, since sockets live in it
STARTED = "EUROTRAIN_STARTED"  # when the guard began (seconds since 1970): what limits are counted from

COMPLETED, FAILED, TIMEOUT, CANCELLED = "completed", "failed", "timeout", "cancelled"

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_WATCHED = _STOP_SIGNALS | {signal.SIGCHLD}
_UNKILLABLE_AFTER = 60.0  # seconds: a process in an uninterruptible system call outlives SIGKILL
_KILLED = 128 + signal.SIGKILL


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code. Raises SystemExit(2) on a bad command line."""
    arguments, command = _parse(sys.argv[1:] if argv is None else argv)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # they are waited for, never handled
    if arguments.die_with_parent:
        parent = os.getppid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended before the kernel knew that we care
            os.kill(os.getpid(), signal.SIGTERM)
    paths = SegmentPaths(arguments.segment.resolve())
    return Guard(paths, arguments.time_limit, arguments.grace, arguments.node).run(command)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="clusters.guard", usage="%(prog)s [options] SEGMENT_DIR -- command …"
    )
    parser.add_argument("segment", type=Path)
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS")  # Slurm's KillWait
    parser.add_argument(
        "--die-with-parent", action="store_true", help="the parent's death cancels the segment"
    )
    parser.add_argument("--node", action="store_true", help="one more node of the segment")
    own, separator, command = _partition(list(argv), "--")
    arguments = parser.parse_args(own)
    if not separator or not command:
        parser.error("no command: write it after --")
    return arguments, command


def _partition(words: list[str], separator: str) -> tuple[list[str], bool, list[str]]:
    if separator not in words:
        return words, False, []
    at = words.index(separator)
    return words[:at], True, words[at + 1 :]


class Guard:
    """One segment's guard: its command, its limits and its janitor."""

    def __init__(self, paths: SegmentPaths, time_limit: float, grace: float, node: bool = False) -> None:
        self.paths, self.grace, self.node = paths, grace, node
        self.started = time.time()
        self.limit = time.monotonic() + time_limit
        sweep()
        self.runtime = make_runtime()
        self.outcome: str | None = None  # known early when it is not for the command to say
        self.kill_at = float("inf")
        self.command = 0

    def run(self, command: list[str]) -> int:
        """Everything from the command's start to the record of its end; its exit code."""
        janitor = self._start_janitor()
        self.command = self._start(command)
        exit_code = self._watch()
        _kill_descendants(spare=janitor)
        self._record(exit_code, self.outcome or (FAILED if exit_code else COMPLETED))
        shutil.rmtree(self.runtime, ignore_errors=True)
        _kill_descendants()
        return exit_code

    def _start_janitor(self) -> int:
        """A process that acts only if this one is killed, which it knows from the end of a pipe."""
        listening, held_until_death = os.pipe()
        pid = os.fork()
        if pid:
            os.close(listening)
            return pid
        try:
            os.setsid()
            os.close(held_until_death)
            _redirect(Path(os.devnull))
            os.read(listening, 1)
            _kill_marked(self.runtime)
            if not self.paths.exit.exists():
                self._record(_KILLED, FAILED)
            shutil.rmtree(self.runtime, ignore_errors=True)
        finally:
            os._exit(0)

    def _start(self, command: list[str]) -> int:
        """The command in a session of its own, so that a terminal's Ctrl-C reaches it through us alone."""
        self.paths.logs.mkdir(parents=True, exist_ok=True)
        guard = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            _die_with(guard)
            os.setsid()
            name = f"node-{socket.gethostname()}" if self.node else "supervisor"
            _redirect(self.paths.logs / f"{name}.log", keep_input=self.node)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            own = {RUNTIME: str(self.runtime), STARTED: repr(self.started)}
            os.execvpe(command[0], command, {**os.environ, **own})  # noqa: S606 - no shell is wanted
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def _watch(self) -> int:
        """Until the command has ended: its exit code."""
        while (status := self._reap()) is None:
            wake = min(self.limit if self.outcome is None else float("inf"), self.kill_at)
            received = signal.sigtimedwait(_WATCHED, min(max(wake - time.monotonic(), 0.0), 3600.0))
            if received is not None and received.si_signo in _STOP_SIGNALS:
                self._stop(CANCELLED)
            elif self.outcome is None and time.monotonic() >= self.limit:
                self._stop(TIMEOUT)
            elif time.monotonic() >= self.kill_at:
                os.kill(self.command, signal.SIGKILL)
                self.kill_at = float("inf")
        return _exit_code(status)

    def _stop(self, outcome: str) -> None:
        """Ask first; whoever asks twice is in a hurry."""
        if self.outcome is None:
            self.outcome, self.kill_at = outcome, time.monotonic() + self.grace
            os.kill(self.command, signal.SIGTERM)
        else:
            self.kill_at = time.monotonic()

    def _reap(self) -> int | None:
        """Bury the dead, orphans included; the command's wait status when it is among them."""
        found = None
        while (dead := _wait_any()) is not None:
            found = dead[1] if dead[0] == self.command else found
        return found

    def _record(self, exit_code: int, outcome: str) -> None:
        if not self.node and self._ours():
            record = {"start": self.started, "end": time.time(), "exit_code": exit_code, "outcome": outcome}
            write_atomically(self.paths.exit, json.dumps(record))

    def _ours(self) -> bool:
        """False when another incarnation has claimed the segment: then its end is not ours to tell."""
        try:
            claim = json.loads(self.paths.claim.read_text())
        except (FileNotFoundError, ValueError):
            return True
        return bool(claim.get("runtime", str(self.runtime)) == str(self.runtime))


def _kill_descendants(spare: int = 0) -> None:
    """Until none is left, `spare` excepted. Whoever forks faster than we look is met in the next turn."""
    give_up = time.monotonic() + _UNKILLABLE_AFTER
    while (left := [pid for pid in _descendants(os.getpid()) if pid != spare]) and time.monotonic() < give_up:
        _kill(left)
        while _wait_any() is not None:
            pass
        time.sleep(0.01)
    if left:
        os.write(2, f"cannot be killed: processes {left}\n".encode())


def _kill_marked(runtime: Path) -> None:
    """Every process that was started with this runtime directory: after the guard's own death the kernel
    no longer knows whose they were, but their environment does. None may be seen for half a second,
    because a process between fork and exec is invisible."""
    quiet_since = time.monotonic()
    give_up = quiet_since + _UNKILLABLE_AFTER
    while time.monotonic() < min(quiet_since + 0.5, give_up):
        marked = [pid for pid in _processes() if _carries(pid, f"{RUNTIME}={runtime}".encode())]
        _kill(marked)
        quiet_since = time.monotonic() if marked else quiet_since
        time.sleep(0.02)


def _descendants(root: int) -> list[int]:
    """Processes below `root`, the dead but unburied included."""
    children: dict[int, list[int]] = {}
    for pid in _processes():
        children.setdefault(_parent(pid), []).append(pid)
    found = list(children.get(root, []))
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _parent(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0  # ended while we looked
    return int(text.rpartition(")")[2].split()[1])  # the name before it may hold blanks and brackets


def _carries(pid: int, variable: bytes) -> bool:
    try:
        return variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended, or another user's
        return False


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # ended while we looked
            os.kill(pid, signal.SIGKILL)


def _wait_any() -> tuple[int, int] | None:
    """One dead child and its status; None when no child is dead."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _exit_code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _redirect(path: Path, keep_input: bool = False) -> None:
    """Standard input from nowhere, both outputs appended to a file: no reader's death can stop the writer."""
    if not keep_input:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _die_with(parent: int) -> None:
    """SIGKILL when the thread that forked us ends; at once if it has ended before we could ask."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(_KILLED)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    sys.exit(main())
