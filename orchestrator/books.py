"""Questions to the ledger's table, each answered by the database: an allocation may have a million lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, select

from orchestrator.tables import entries

GRANT = "grant"  # units given to the allocation
RESERVATION = "reservation"  # set aside before a submission: the worst case of a segment
RELEASE = "release"  # of a reservation, what is not used
SETTLEMENT = "settlement"  # what accounting says a segment used
CORRECTION = "correction"  # what accounting says beside the settlements; may be negative


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. `time` is the database's clock."""

    id: int
    allocation: str
    kind: str
    amount: int
    unit: str
    reference: str
    time: float
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Books:
    """The lines of one allocation, within a transaction."""

    connection: Connection
    allocation: str

    @property
    def unit(self) -> str | None:
        """None where there is no such allocation: a grant opens it."""
        query = select(entries.c.unit).where(self._lines(GRANT)).limit(1)
        return self.connection.execute(query).scalar_one_or_none()

    def booked(self, kind: str, reference: str) -> Entry | None:
        query = select(entries).where(self._lines(kind), entries.c.reference == reference)
        row = self.connection.execute(query).mappings().one_or_none()
        return None if row is None else Entry(**row)

    def total(self, *kinds: str) -> int:
        """Micro-units, of all lines of these kinds."""
        query = select(func.sum(entries.c.amount)).where(self._lines(*kinds))
        return int(self.connection.execute(query).scalar_one() or 0)

    def heard(self) -> float:
        """When accounting told something last, by the database's clock."""
        query = select(func.max(entries.c.time)).where(self._lines(GRANT, SETTLEMENT, CORRECTION))
        return float(self.connection.execute(query).scalar_one())

    def open_reservations(self) -> dict[str, int]:
        """Those neither settled nor released, by reference."""
        over = entries.alias()
        same = and_(
            over.c.allocation == entries.c.allocation,
            over.c.kind.in_((RELEASE, SETTLEMENT)),
            over.c.reference == entries.c.reference,
        )
        ended = select(over.c.id).where(same).exists()
        query = select(entries.c.reference, entries.c.amount).where(self._lines(RESERVATION), ~ended)
        return {row.reference: row.amount for row in self.connection.execute(query)}

    def settled(self, references: list[str]) -> set[str]:
        """Which of these are settled."""
        return {reference for reference in references if self.booked(SETTLEMENT, reference)}

    def lines(self) -> list[Entry]:
        """All of them, oldest first."""
        query = select(entries).where(entries.c.allocation == self.allocation).order_by(entries.c.id)
        return [Entry(**row) for row in self.connection.execute(query).mappings()]

    def _lines(self, *kinds: str) -> ColumnElement[bool]:
        return and_(entries.c.allocation == self.allocation, entries.c.kind.in_(kinds))


def names(connection: Connection) -> list[str]:
    """All allocations, in the order of their names."""
    query = select(entries.c.allocation).where(entries.c.kind == GRANT).distinct()
    return sorted(connection.scalars(query))
