"""A site reached through the system's OpenSSH: one execution of ssh per exchange, files by sftp beside it.

    site = SshConnection("leonardo", "/leonardo_scratch/large/userexternal/me/eurotrain", home)

The agent is a file at the site, named after its contents (clusters/package.py); where it is not yet, the
first exchange brings it. A request goes in by standard input, the answer comes framed by standard output.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Callable  # noqa: UP035 - Python 3.9 syntax, as in the whole room

from clusters import carry, package
from clusters.agent import FRAME, PROTOCOL
from clusters.connection import Parcel, Unreachable, parse_answer
from clusters.paths import sha256_of, sync_directory
from clusters.ssh_budget import Budget, Limits
from clusters.ssh_session import Output, Session

_SMALL = 256 << 10  # bytes: a file that travels within an exchange
_MARGIN = 5.0  # seconds by which the agent gives up before we do
_INSTALL_SECONDS = 120.0
_START_SECONDS = 90.0  # of Python on a busy login node, its modules on a cold file system
_NOT_THERE = re.compile(r"can't (open file|find '__main__' module)|No such file or directory")


@dataclass(frozen=True)
class SshConnection:
    """One site by the name that the operator types after `ssh`. Satisfies clusters.connection.Connection."""

    alias: str
    scratch: str
    home: Path  # EUROTRAIN_HOME: the site's budget of calls is kept there
    python: str = "python3"  # at the site, 3.9 or later
    config: Path | None = None  # instead of the operator's ~/.ssh/config
    carrier: str = ""  # another name for files: the site's data mover
    bandwidth_kbit: int = 0  # per second, of file transfers; 0: as fast as it goes
    limits: Limits = field(default_factory=Limits)

    # ---- exchanges

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        """Results of the operations, in order. Raises Unreachable."""
        patience = max(1.0, timeout - _MARGIN)
        request = {
            "protocol": PROTOCOL,
            "scratch": self.scratch,
            "operations": operations,
            "timeout": patience,
        }
        done = self._ask(json.dumps(request).encode(), timeout)
        if _is_missing(done):
            self._install()
            done = self._ask(json.dumps(request).encode(), timeout)
        try:
            output = unframe(done.output) if done.code == 0 else ""
            return parse_answer(done.code, output, done.errors, len(operations))
        except Unreachable as error:
            raise Unreachable(f"{self.alias}: {error}") from error

    def _ask(self, request: bytes, timeout: float) -> Output:
        return self.session.command(f"{self.python} -Es {shlex.quote(self._agent_path())}", request, timeout)

    def _install(self) -> None:
        """Bring the agent, checked and renamed into place by the interpreter that will run it."""
        built = package.build()
        words = package.install_words(self._agent_path(), built.content)
        line = f"{self.python} -Es {' '.join(map(shlex.quote, words))}"
        done = self.session.command(line, built.content, _INSTALL_SECONDS)
        if done.code:
            lines = done.errors.strip().splitlines()[-1:] or [f"exit code {done.code}"]
            raise Unreachable(f"{self.alias}: cannot install the agent: {lines[0][:300]}")

    def _agent_path(self) -> str:
        return f"{self.scratch}/agent/{package.build().name}"

    @functools.cached_property
    def _known_to_carry(self) -> set[str]:
        """Names under which a module was imported."""
        return set()

    @functools.cached_property
    def session(self) -> Session:
        return self._session(self.alias)

    @functools.cached_property
    def _files_session(self) -> Session:
        return self._session(self.carrier) if self.carrier else self.session

    def _session(self, alias: str) -> Session:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", alias)
        return Session(alias, Budget(self.home / "ssh" / f"{name}.json", alias, self.limits), self.config)

    def pipe(self, python: str, module: str) -> list[str]:
        """A command line that runs a module at the site, its standard streams those of the caller.

        `python` is a command as a shell there reads it. It goes over the shared session, which is opened
        first: to the site's data mover where the module can be imported there, since login nodes end what
        takes long. Raises Unreachable.
        """
        session = self._carrying(python, module)
        session.budget.take(False, session.credentials, session.remedy())
        return ["ssh", *session.options(), "-T", session.alias, f"{python} -P -m {module}"]

    def _carrying(self, python: str, module: str) -> Session:
        why = ""
        for session in dict.fromkeys((self._files_session, self.session)):
            if session.alias in self._known_to_carry and session.is_live():
                return session
            done = session.command(f"{python} -P -c {shlex.quote(f'import {module}')}", b"", _START_SECONDS)
            if done.code == 0:
                self._known_to_carry.add(session.alias)
                return session
            why = (done.errors.strip().splitlines() or [f"exit code {done.code}"])[-1]
        raise Unreachable(f"{self.alias}: {python} cannot run {module}: {why[:300]}")

    # ---- files

    def fetch(self, source: str, target: Path) -> int:
        """Copy a file from the site's scratch; bytes carried. Raises Unreachable.

        What a broken transfer leaves is gone on with. The file appears at `target` whole and verified.
        """
        (told,) = self.exchange([{"op": "read", "path": source, "limit": _SMALL}], timeout=600.0)
        self._check(told)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{told['sha256'][:16]}.part")
        if "content" in told:
            part.write_bytes(base64.b64decode(told["content"]))
        else:
            self._sftp([f"get -a {_quoted(f'{self.scratch}/{source}')} {_quoted(str(part))}"], told["size"])
        if sha256_of(part) != told["sha256"]:
            part.unlink()
            raise Unreachable(f"{self.alias}: {source} has arrived damaged; what came was thrown away")
        part.replace(target)
        sync_directory(target.parent)
        return int(told["size"])

    def push(self, source: Path, target: str) -> int:
        """Copy a file to the site's scratch, visible only when whole; bytes carried. Raises Unreachable.

        What a broken transfer leaves at the site is gone on with; the site verifies before it renames.
        """
        try:
            size, sha256 = source.stat().st_size, sha256_of(source)
        except OSError as error:
            raise Unreachable(f"cannot copy {source}: {error}") from error
        operation: dict[str, Any] = {"op": "receive", "target": target, "sha256": sha256}
        if size <= _SMALL:
            operation["content"] = base64.b64encode(source.read_bytes()).decode()
        else:
            operation["part"] = f"incoming/{sha256}.part"
            (room,) = self.exchange([{"op": "expect", "part": operation["part"]}])
            self._check(room)
            if room["size"] < size:
                there = _quoted(f"{self.scratch}/{operation['part']}")
                self._sftp([f"put -a {_quoted(str(source))} {there}"], size - room["size"])
        (told,) = self.exchange([operation], timeout=600.0)
        self._check(told)
        return size

    def carry(self, parcels: Sequence[Parcel], progress: Callable[[int], None], bandwidth: int = 0) -> None:
        """Append to files at the site, by its data mover where it has one. Raises Unreachable."""
        carry.upload(self._files_session, self.scratch, parcels, progress, bandwidth, _quoted)

    def _sftp(self, batch: list[str], size: int) -> None:
        rate = min(carry.SLOWEST, self.bandwidth_kbit * 125 / 2 or carry.SLOWEST)
        limit = ["-l", str(self.bandwidth_kbit)] if self.bandwidth_kbit else []
        session = self._files_session
        words = ["sftp", "-q", *limit, *session.options(), "-b", "-", session.alias]
        done = session.run(words, "\n".join(batch).encode() + b"\n", 60.0 + size / rate)
        if done.code:
            lines = done.errors.strip().splitlines()[-1:] or [f"exit code {done.code}"]
            raise Unreachable(f"{session.alias}: sftp: {lines[0][:300]}")

    def _check(self, told: dict[str, Any]) -> None:
        if not told["ok"]:
            raise Unreachable(f"{self.alias}: {told['error']}")


def unframe(output: bytes) -> str:
    """The answer within what a login shell and the agent printed. Raises Unreachable when it is not whole."""
    before, found, rest = output.rpartition(f"\n{FRAME} ".encode())
    if not found:
        begins = output.decode(errors="replace").strip()[:80]
        raise Unreachable(f"no answer from the agent; the site printed {begins!r}")
    header, _, body = rest.partition(b"\n")
    words = header.decode(errors="replace").split()
    size = int(words[0]) if words and words[0].isdigit() else -1
    if len(words) != 2 or len(body) < size:
        raise Unreachable(f"the answer was cut short at {len(body)} bytes of {max(size, 0)}")
    answer = body[:size]
    if hashlib.sha256(answer).hexdigest() != words[1]:
        raise Unreachable(f"the answer was garbled on its way, after {len(before)} bytes of other output")
    return answer.decode()


def _is_missing(done: Output) -> bool:
    """Whether the interpreter is there but not the agent: never brought, or purged."""
    return done.code == 2 and bool(_NOT_THERE.search(done.errors))


def _quoted(path: str) -> str:
    """A path as sftp reads it in a batch: every character that could mean something else is escaped."""
    if "\n" in path:
        raise ValueError(f"a file's name must not have a line break: {path!r}")
    return re.sub(r"([^A-Za-z0-9_./@%+=:,-])", r"\\\1", str(PurePosixPath(path)))
