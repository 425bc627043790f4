"""Asks every site at once what is new, one exchange per site in flight, and never in a hurry."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from clusters.connection import Connection, Unreachable

_FIRST_PAUSE = 1.0  # seconds after a failure; doubles up to the longest
_LONGEST_PAUSE = 300.0
_SLACK = 60.0  # seconds an exchange may take beyond what it waits at the site

Answer = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """What to ask a site: the streams' and log files' offsets of each key that is not over."""

    streams: Mapping[str, Mapping[str, int]]
    logs: Mapping[str, Mapping[str, int]]
    wait_seconds: float
    scheduler: str = "local"
    limits: Mapping[str, Any] | None = None  # an operation that asks what the site allows

    def operations(self) -> list[dict[str, Any]]:
        """Jobs are looked up before events are read: an ended job has no event after its end."""
        return [
            {"op": "watch", "since": self.streams, "seconds": self.wait_seconds},
            {"op": "jobs", "keys": list(self.streams), "scheduler": self.scheduler},
            {"op": "events", "since": self.streams},
            {"op": "logs", "since": self.logs},
            *([dict(self.limits)] if self.limits else []),
        ]


@dataclass
class Poller:
    """Exchanges in flight, and the pauses of sites that did not answer."""

    connections: Mapping[str, Connection]
    seconds: Mapping[str, float] = field(default_factory=dict)  # between two exchanges with a site
    _flying: dict[str, Future[Answer]] = field(default_factory=dict, init=False)
    _failures: dict[str, int] = field(default_factory=dict, init=False)
    _not_before: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(self.connections)), thread_name_prefix="poll")

    def may_ask(self, site: str) -> bool:
        """Whether no exchange is in flight, and the site has no pause."""
        return site not in self._flying and time.monotonic() >= self._not_before.get(site, 0.0)

    def ask(self, site: str, question: Question) -> None:
        """Start an exchange, if one may be started."""
        if not self.may_ask(site):
            return
        timeout = question.wait_seconds + _SLACK
        connection = self.connections[site]
        self._flying[site] = self._pool.submit(connection.exchange, question.operations(), timeout)

    def answers(self, seconds: float) -> dict[str, Answer | Unreachable]:
        """What has come back, waiting for the first answer no longer than asked."""
        if not self._flying:
            time.sleep(seconds)
            return {}
        wait(self._flying.values(), timeout=seconds, return_when=FIRST_COMPLETED)
        done = [site for site, future in self._flying.items() if future.done()]
        return {site: self._result(site, self._flying.pop(site)) for site in done}

    def close(self) -> None:
        """Leave exchanges in flight to end by themselves; they change nothing at the site."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _result(self, site: str, future: Future[Answer]) -> Answer | Unreachable:
        try:
            answer = future.result()
        except Unreachable as error:
            count = self._failures[site] = self._failures.get(site, 0) + 1
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (count - 1)) * _jitter(0.5)
            self._not_before[site] = time.monotonic() + pause
            return error
        self._failures.pop(site, None)
        self._not_before[site] = time.monotonic() + self.seconds.get(site, 0.0) * _jitter(0.2)
        return answer


def _jitter(share: float) -> float:
    """Sites watched by many controllers should not be asked by all of them at once."""
    return random.uniform(1 - share, 1 + share)  # noqa: S311
