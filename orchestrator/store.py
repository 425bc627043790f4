"""The event log: what happened, in the order it became known. Append-only; everything else is derived.

A site's lines come in with `ingest`, which moves the stream's cursor in the same transaction: a
controller killed at any moment has either both or neither, and asks again from where it was.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, insert, select, update

from clusters.events import GARBLED
from orchestrator.database import MOUNTS, Database
from orchestrator.tables import cursors, events, leases

CONTROLLER = "controller"  # the stream of the controller's own events, at no site and of no segment
_LATEST = 1e11  # seconds since 1970: the year 5138
_KIND = re.compile(r"[a-z0-9_.]{1,64}")


@dataclass(frozen=True)
class Event:
    """One line of the log. `time` is the writer's clock, `received` the database's."""

    id: int
    run: str
    site: str
    segment: str
    stream: str
    offset: int
    time: float
    received: float
    kind: str
    facts: dict[str, Any]


class Store:
    """The log, and who may act on it.

    Raises ValueError for a place that will not do (a network file system, a newer format), and
    orchestrator.database.StoreError, one line, when the database cannot work (disk full, no connection).
    """

    def __init__(self, location: str | Path, mounts: Path = MOUNTS) -> None:
        self.database = Database(location, mounts)

    def close(self) -> None:
        self.database.close()

    # ---- events

    def record(self, run: str, kind: str, /, **facts: Any) -> Event:
        """Log an event of the controller's own; durable when this returns."""
        mine = (events.c.run == run) & (events.c.site == "") & (events.c.segment == "")
        with self.database.writing() as connection:
            now = self._now(connection)
            last = connection.scalar(
                select(func.max(events.c.offset)).where(mine, events.c.stream == CONTROLLER)
            )
            row = {
                "run": run, "site": "", "segment": "", "stream": CONTROLLER,
                "offset": 0 if last is None else last + 1,
                "time": now, "received": now, "kind": kind, "facts": facts,
            }  # fmt: skip
            return _insert(connection, [row])[0]

    def ingest(self, run: str, site: str, segment: str, streams: Mapping[str, Any]) -> list[Event]:
        """As `ingest_site`, of one segment."""
        return self.ingest_site(run, site, {segment: streams})

    def ingest_site(self, run: str, site: str, told: Mapping[str, Mapping[str, Any]]) -> list[Event]:
        """Add what a site's agent told of its segments, in one transaction; returns the lines that are new.

        `told` is as clusters.agent answers: `{segment: {stream: {"lines": [...], "offset": next}}}`.
        Lines that are already here are skipped. Lines of a segment's streams are merged by the site's clock.
        Raises ValueError when lines are missing between the cursor and the first one.
        """
        news = {segment: streams for segment, streams in told.items() if streams}
        if not news:
            return []
        with self.database.writing() as connection:
            known = _cursors(connection, site, news)
            common = {"run": run, "site": site, "received": self._now(connection)}
            rows: list[dict[str, Any]] = []
            for segment, streams in news.items():
                at = known[segment]
                fresh = [_fresh(name, at.get(name, 0), said["lines"]) for name, said in streams.items()]
                rows += [{**common, "segment": segment, **row} for row in _by_time(fresh)]
            _move_cursors(connection, site, known, news)
            return _insert(connection, rows)

    def cursors(self, site: str, segment: str) -> dict[str, int]:
        """As `cursors_of`, of one segment."""
        return self.cursors_of(site, [segment])[segment]

    def cursors_of(self, site: str, segments: Collection[str]) -> dict[str, dict[str, int]]:
        """The offset to ask each stream of each segment from; streams never heard of are absent (0)."""
        with self.database.reading() as connection:
            return _cursors(connection, site, segments)

    def events(self, run: str, after: int = 0, kinds: Collection[str] = ()) -> list[Event]:
        """A run's events with an id above `after`, in the order they became known."""
        query: Select[Any] = select(events).where(events.c.run == run, events.c.id > after)
        if kinds:
            query = query.where(events.c.kind.in_(kinds))
        with self.database.reading() as connection:
            return [Event(*row) for row in connection.execute(query.order_by(events.c.id))]

    def runs(self) -> list[str]:
        """All runs, oldest first."""
        query = select(events.c.run).group_by(events.c.run).order_by(func.min(events.c.id))
        with self.database.reading() as connection:
            return list(connection.scalars(query))

    # ---- the lease: one coordinator per run

    def acquire(self, run: str, holder: str, seconds: float) -> bool:
        """Become the run's coordinator for so long, unless another is; `holder` names one process."""
        with self.database.writing() as connection:
            now = self._now(connection)
            current = connection.execute(select(leases).where(leases.c.run == run)).one_or_none()
            if current and current.holder != holder and current.expires > now:
                return False
            connection.execute(delete(leases).where(leases.c.run == run))
            connection.execute(insert(leases).values(run=run, holder=holder, expires=now + seconds))
            return True

    def renew(self, run: str, holder: str, seconds: float) -> bool:
        """Stay coordinator; False when another has taken over. Late is fine while nobody has."""
        mine = (leases.c.run == run) & (leases.c.holder == holder)
        with self.database.writing() as connection:
            until = self.database.now + seconds
            return connection.execute(update(leases).where(mine).values(expires=until)).rowcount == 1

    def release(self, run: str, holder: str) -> None:
        """Give the lease back; nothing happens to another's."""
        mine = (leases.c.run == run) & (leases.c.holder == holder)
        with self.database.writing() as connection:
            connection.execute(delete(leases).where(mine))

    def holder(self, run: str) -> str | None:
        """Who coordinates the run now, by the database's clock."""
        query = select(leases.c.holder).where(leases.c.run == run, leases.c.expires > self.database.now)
        with self.database.reading() as connection:
            return connection.scalar(query)

    def _now(self, connection: Connection) -> float:
        return float(connection.execute(select(self.database.now)).scalar_one())


def _insert(connection: Connection, rows: list[dict[str, Any]]) -> list[Event]:
    if not rows:
        return []
    statement = insert(events).returning(events.c.id, sort_by_parameter_order=True)
    return [Event(**row, id=new) for row, new in zip(rows, connection.scalars(statement, rows), strict=True)]


def _cursors(connection: Connection, site: str, segments: Collection[str]) -> dict[str, dict[str, int]]:
    known: dict[str, dict[str, int]] = {segment: {} for segment in segments}
    columns = select(cursors.c.segment, cursors.c.stream, cursors.c.offset)
    for some in _in_tens_of_hundreds(list(segments)):
        query = columns.where(cursors.c.site == site, cursors.c.segment.in_(some))
        for segment, stream, offset in connection.execute(query):
            known[segment][stream] = offset
    return known


def _in_tens_of_hundreds(names: list[str]) -> Iterator[list[str]]:
    """Parameters of one statement: SQLite takes 32,766 of them, PostgreSQL 65,535."""
    yield from (names[at : at + 1000] for at in range(0, len(names), 1000))


def _move_cursors(
    connection: Connection,
    site: str,
    known: Mapping[str, Mapping[str, int]],
    told: Mapping[str, Mapping[str, Any]],
) -> None:
    new, moved = [], []
    for segment, streams in told.items():
        for stream, said in streams.items():
            before = known[segment].get(stream)
            if before is None:
                new.append({"site": site, "segment": segment, "stream": stream, "offset": said["offset"]})
            elif said["offset"] > before:
                moved.append({"of_segment": segment, "of_stream": stream, "to": said["offset"]})
    if new:
        connection.execute(insert(cursors), new)
    if moved:
        mine = (cursors.c.site == site) & (cursors.c.segment == bindparam("of_segment"))
        one = update(cursors).where(mine, cursors.c.stream == bindparam("of_stream"))
        connection.execute(one.values(offset=bindparam("to")), moved)


def _fresh(stream: str, cursor: int, lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines from the cursor on, as rows. Raises ValueError for a hole or for lines out of order."""
    new = [line for line in lines if line["offset"] >= cursor]
    if new and new[0]["offset"] != cursor:
        raise ValueError(f"{stream}: nothing is known of bytes {cursor} to {new[0]['offset']}; ask again")
    if any(b["offset"] <= a["offset"] for a, b in pairwise(new)):
        raise ValueError(f"{stream}: lines after byte {cursor} are out of order")
    return [{"stream": stream, **_row(line)} for line in new]


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says, or that it is garbled: nothing a site writes may stop the log."""
    kind, time = line["kind"], line.get("time")
    facts = {key: value for key, value in line.items() if key not in ("offset", "kind", "time")}
    if not _KIND.fullmatch(kind) or not isinstance(time, (int, float)) or not 0 <= time < _LATEST:
        text = json.dumps({"kind": kind, "time": time, **facts})[:200]
        kind, time, facts = GARBLED, 0.0, {"text": text}
    return {"offset": line["offset"], "time": float(time), "kind": kind, "facts": facts}


def _by_time(streams: Iterable[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Merge streams by time, each kept in its own order: a clock that was set back reorders nothing."""
    return heapq.merge(*streams, key=lambda row: row["time"])
