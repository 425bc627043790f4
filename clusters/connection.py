"""How the controller reaches a site: one exchange with its agent, and files carried in and out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Protocol  # noqa: UP035 - Python 3.9 syntax, as in the whole room

from clusters.agent import PROTOCOL, answer
from clusters.paths import sync_directory

_BLOCK = 1 << 20


class Unreachable(Exception):
    """The site gave no answer that can be understood. What it did meanwhile is unknown (law 2)."""


@dataclass(frozen=True)
class Parcel:
    """A file to be appended to what has arrived of it: `have` bytes of `size` at `part` under scratch."""

    source: Path
    part: str
    have: int
    size: int


class Connection(Protocol):
    """One site, as the controller sees it. Every transport passes the same tests."""

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        """Results of the operations, in order. Raises Unreachable."""

    def fetch(self, source: str, target: Path) -> int:
        """Copy a file from the site's scratch; bytes carried. Raises Unreachable."""

    def push(self, source: Path, target: str) -> int:
        """Copy a file to the site's scratch, visible only when whole; bytes carried. Raises Unreachable."""

    def carry(self, parcels: Sequence[Parcel], progress: Callable[[int], None], bandwidth: int = 0) -> None:
        """Append to files at the site, which `take` has made room for; it verifies them, not we.

        `progress` hears how many bytes are on their way now; `bandwidth` in bytes per second, 0 for all
        there is. Raises Unreachable; what has arrived then stays.
        """


@dataclass(frozen=True)
class LocalConnection:
    """A site on this machine: the agent as a child process in a session of its own.

    Where it would only look, this process looks itself: an interpreter started about once a second took
    6 % of the CPU seconds that the demo's four ranks had, on two cores.
    """

    scratch: Path
    python: str = sys.executable

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        request = {"protocol": PROTOCOL, "scratch": str(self.scratch), "operations": operations}
        self.scratch.mkdir(parents=True, exist_ok=True)
        if self.python == sys.executable and all(map(_only_looks, operations)):
            return list(answer(request)["results"])
        return self._ask(request, timeout)

    def _ask(self, request: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        command = [self.python, "-P", "-m", "clusters.agent"]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout,
                check=False, start_new_session=True, cwd=self.scratch, env=operators_environment(),
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unreachable(f"no answer from the agent at {self.scratch}: {error}") from error
        expected = len(request["operations"])
        return parse_answer(done.returncode, done.stdout, done.stderr, expected)

    def fetch(self, source: str, target: Path) -> int:
        return _copy(self.scratch / source, target)

    def push(self, source: Path, target: str) -> int:
        return _copy(source, self.scratch / target)

    def carry(self, parcels: Sequence[Parcel], progress: Callable[[int], None], bandwidth: int = 0) -> None:
        del bandwidth  # nothing leaves this machine
        done = 0
        for parcel in parcels:
            try:
                with parcel.source.open("rb") as given, (self.scratch / parcel.part).open("ab") as taken:
                    given.seek(parcel.have)
                    while block := given.read(_BLOCK):
                        taken.write(block)
                        done += len(block)
                        progress(done)
            except OSError as error:
                raise Unreachable(f"cannot copy {parcel.source} to {self.scratch}: {error}") from error


def _only_looks(operation: dict[str, Any]) -> bool:
    """Whether an operation reads the site's files and does nothing else."""
    looks = operation.get("op") in ("watch", "jobs", "events", "logs")
    return looks and operation.get("scheduler", "local") == "local"


def parse_answer(code: int, output: str, errors: str, expected: int) -> list[dict[str, Any]]:
    """The results in an agent's output. Raises Unreachable when it is not a whole answer."""
    if code != 0:
        lines: Iterable[str] = errors.strip().splitlines()[-1:] or [f"exit code {code}"]
        raise Unreachable(f"the agent failed: {''.join(lines)[:300]}")
    try:
        told = json.loads(output)
        results = told["results"]
        if told["protocol"] != PROTOCOL or len(results) != expected:
            raise ValueError(f"protocol {told['protocol']}, {len(results)} of {expected} results")
    except (ValueError, KeyError, TypeError) as error:
        raise Unreachable(f"the agent's answer is not usable: {error}; it begins {output[:80]!r}") from error
    return list(results)


def _copy(source: Path, target: Path) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Unreachable(f"cannot copy {source} to {target}: {error}") from error
    sync_directory(target.parent)
    return target.stat().st_size


def operators_environment() -> dict[str, str]:
    """This process's environment without what would make a job believe it runs inside another one."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SUBMITIT_", "SLURM_", "RAY_"))}
