"""How often a site may be called: a daily budget, pauses after failures, no knocking where one was refused.

All processes of an operator share one small file per site, so that neither a restarted controller nor a
second one makes a site's administrators think of an attack.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clusters.connection import Unreachable

_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 900.0  # seconds; doubles with every failure
_DAY = 86400


@dataclass(frozen=True)
class Limits:
    """Per site and day (UTC). A poll every 20 s is 4,320 commands."""

    connections: int = 200
    commands: int = 10_000


@dataclass
class Record:
    """What the file holds."""

    day: int = 0  # since 1970
    connections: int = 0
    commands: int = 0
    failures: int = 0  # in a row
    not_before: float = 0.0  # seconds since 1970
    refused: str = ""  # why the site did not let the operator in
    credentials: str = ""  # what was tried then: a digest of keys, certificates, agent


@dataclass(frozen=True)
class Budget:
    """One site's calls."""

    path: Path
    site: str
    limits: Limits = field(default_factory=Limits)
    now: Callable[[], float] = time.time
    random: Callable[[], float] = random.random

    def take(self, connects: bool, credentials: Callable[[], str], remedy: str) -> None:
        """Count a command, and a connection where one must be made. Raises Unreachable when it may not be.

        A session that the operator opened is used whatever happened before.
        """
        with self._open() as record:
            if connects:
                self._may_connect(record, credentials, remedy)
            for kind, limit in (("commands", self.limits.commands), ("connections", self.limits.connections)):
                if getattr(record, kind) >= limit and (connects or kind == "commands"):
                    raise Unreachable(f"{self.site}: the day's budget of {limit} {kind} is spent")
            record.commands += 1
            record.connections += connects

    def _may_connect(self, record: Record, credentials: Callable[[], str], remedy: str) -> None:
        if record.refused and record.credentials == credentials():
            raise Unreachable(f"{self.site}: {record.refused}; {remedy}")
        if self.now() < record.not_before:
            wait = record.not_before - self.now()
            raise Unreachable(f"{self.site}: {record.failures} failures in a row, next try in {wait:.0f} s")

    def succeeded(self) -> None:
        with self._open() as record:
            record.failures, record.not_before, record.refused, record.credentials = 0, 0.0, "", ""

    def failed(self) -> None:
        """No connection or no answer: a pause before the next one, longer each time, in step with nobody."""
        with self._open() as record:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(record.failures, 20))
            record.failures += 1
            record.not_before = self.now() + pause * (0.5 + self.random())

    def was_refused(self, reason: str, credentials: str) -> None:
        """The site did not let the operator in: no further attempt with the same credentials."""
        with self._open() as record:
            record.refused, record.credentials = reason, credentials

    def read(self) -> Record:
        """Today's counts, for people."""
        with self._open() as record:
            return record

    @contextlib.contextmanager
    def _open(self) -> Iterator[Record]:
        """The record, written back when it has changed. A file that cannot be read begins anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._load()
            record = Record(**asdict(before))
            today = int(self.now() // _DAY)
            if record.day != today:
                record.day, record.connections, record.commands = today, 0, 0
            yield record
            if record != before:
                self._write(record)

    def _write(self, record: Record) -> None:
        """Whole or not at all, but not synced: that would cost every poll 10 ms, a power cut only a count."""
        temporary = self.path.with_suffix(".new")  # one writer at a time: the lock is held
        temporary.write_text(json.dumps(asdict(record)))
        temporary.replace(self.path)

    def _load(self) -> Record:
        try:
            raw = json.loads(self.path.read_text())
            values = {name: type(value)(raw[name]) for name, value in asdict(Record()).items()}
            return Record(**values)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return Record()
