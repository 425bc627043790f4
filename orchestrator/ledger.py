"""Who may spend what: grants, reservations, settlements. Append-only, in the event log's database.

Amounts are whole millionths of the allocation's native unit (orchestrator/units.py says why). Law 3:
available = granted - settled - burning - committed, and nothing is submitted without a reservation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select

from orchestrator.store import Store
from orchestrator.suggest import unknown
from orchestrator.tables import entries
from orchestrator.units import format_units

GRANT = "grant"  # units given to the allocation
RESERVATION = "reservation"  # set aside before a submission: the worst case of a segment
RELEASE = "release"  # of a reservation, what is not used
SETTLEMENT = "settlement"  # what accounting says a segment used
CORRECTION = "correction"  # what accounting says beside the settlements; may be negative

NOTHING: Mapping[str, int] = {}


@dataclass(frozen=True)
class Balance:
    """An allocation at one moment, in micro-units; `age` in seconds since accounting was last heard."""

    allocation: str
    unit: str
    granted: int
    settled: int  # settlements and corrections
    burning: int  # used by segments that accounting has not told of yet
    committed: int  # the rest of their reservations, and the reservations of queued segments
    age: float

    @property
    def available(self) -> int:
        return self.granted - self.settled - self.burning - self.committed

    def __str__(self) -> str:
        parts = ("granted", "settled", "burning", "committed")
        figures = [f"{part} {format_units(getattr(self, part), '', exact=True).split()[0]}" for part in parts]
        return f"{format_units(self.available, self.unit, exact=True)} available ({', '.join(figures)})"


class Overdraft(ValueError):
    """A reservation was refused: the allocation does not hold so much."""

    def __init__(self, balance: Balance, asked: int) -> None:
        wanted = format_units(asked, balance.unit, exact=True)
        super().__init__(f"allocation {balance.allocation!r}: {wanted} asked, {balance}")
        self.balance = balance
        self.asked = asked


@dataclass(frozen=True)
class Settlement:
    """What a settlement did, in micro-units. An excess is booked as it is, and somebody should ask why."""

    amount: int
    released: int  # of the reservation, now free again
    excess: int  # used above the reservation


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


class Ledger:
    """The ledger of a store. Every operation may be repeated: a reference is booked once."""

    def __init__(self, store: Store) -> None:
        self._database = store.database

    def grant(
        self, allocation: str, amount: int, unit: str, reference: str, evidence: Mapping[str, Any] = NOTHING
    ) -> bool:
        """Add to an allocation, which the first grant opens; False when this grant is booked already.

        Raises ValueError when the grant is in another unit than those before, or was booked differently.
        """
        if amount <= 0:
            raise ValueError(f"a grant of {format_units(amount, unit)} is none; it must be above 0")
        with self._database.writing() as connection:
            rows = _rows(connection, allocation)
            if rows and rows[0].unit != unit:
                raise ValueError(f"allocation {allocation!r} is counted in {rows[0].unit}s, not in {unit}s")
            booked = _booked(rows, GRANT, reference)
            if booked is None:
                self._book(connection, (allocation, GRANT, amount, unit, reference), evidence)
            else:
                _same(booked, amount)
            return booked is None

    def reserve(
        self, allocation: str, reference: str, amount: int, burning: Mapping[str, int] = NOTHING
    ) -> Balance:
        """Set units aside before a submission; the balance after it. `burning` is as for `balance`.

        Raises Overdraft when the allocation does not hold them, ValueError when the reference has
        reserved another amount or is over: a further segment needs a key of its own.
        """
        _natural(amount)
        with self._database.writing() as connection:
            rows = self._known(connection, allocation)
            booked = _booked(rows, RESERVATION, reference)
            if any(_booked(rows, over, reference) for over in (RELEASE, SETTLEMENT)):
                raise ValueError(f"the reservation {reference!r} in {allocation!r} is over")
            if booked is not None:
                _same(booked, amount)
                return self._tally(connection, rows, burning)
            before = self._tally(connection, rows, burning)
            if amount > before.available:
                raise Overdraft(before, amount)
            self._book(connection, (allocation, RESERVATION, amount, before.unit, reference), NOTHING)
            return self._tally(connection, _rows(connection, allocation), burning)

    def settle(
        self, allocation: str, reference: str, amount: int, evidence: Mapping[str, Any] = NOTHING
    ) -> Settlement:
        """Book what a segment used and free the rest of its reservation, together.

        Raises ValueError when the reference was settled with another amount: that needs `correct`.
        """
        _natural(amount)
        with self._database.writing() as connection:
            rows = self._known(connection, allocation)
            booked = _booked(rows, SETTLEMENT, reference)
            if booked is not None:
                _same(booked, amount)
                freed = _booked(rows, RELEASE, reference)
                return Settlement(amount, freed.amount if freed else 0, booked.evidence.get("excess", 0))
            held = _open(rows).get(reference, 0)
            done = Settlement(amount, max(0, held - amount), max(0, amount - held))
            flag = {"excess": done.excess} if done.excess else {}
            unit = rows[0].unit
            self._book(connection, (allocation, SETTLEMENT, amount, unit, reference), {**evidence, **flag})
            if done.released:
                self._book(connection, (allocation, RELEASE, done.released, unit, reference), NOTHING)
            return done

    def release(self, allocation: str, reference: str) -> int:
        """Free a reservation that was never used; how much. Nothing happens when it is over already."""
        with self._database.writing() as connection:
            rows = self._known(connection, allocation)
            held = _open(rows).get(reference)
            if held is not None:
                self._book(connection, (allocation, RELEASE, held, rows[0].unit, reference), NOTHING)
            return held or 0

    def correct(self, allocation: str, reference: str, amount: int, evidence: Mapping[str, Any]) -> bool:
        """Add to what is settled (or take from it) as accounting says; False when booked already."""
        with self._database.writing() as connection:
            rows = self._known(connection, allocation)
            booked = _booked(rows, CORRECTION, reference)
            if booked is None:
                self._book(connection, (allocation, CORRECTION, amount, rows[0].unit, reference), evidence)
            else:
                _same(booked, amount)
            return booked is None

    def balance(self, allocation: str, burning: Mapping[str, int] = NOTHING) -> Balance:
        """What the allocation holds; `burning` is what each segment not settled has used, by reference.

        Raises ValueError, naming the nearest, when there is no such allocation.
        """
        with self._database.reading() as connection:
            return self._tally(connection, self._known(connection, allocation), burning)

    def allocations(self) -> list[str]:
        with self._database.reading() as connection:
            return _names(connection)

    def entries(self, allocation: str) -> list[Entry]:
        """All lines of an allocation, oldest first."""
        with self._database.reading() as connection:
            return list(_rows(connection, allocation))

    # ---- inside a transaction

    def _book(
        self, connection: Connection, line: tuple[str, str, int, str, str], evidence: Mapping[str, Any]
    ) -> None:
        names = ("allocation", "kind", "amount", "unit", "reference")
        row = dict(zip(names, line, strict=True), time=self._database.now, evidence=dict(evidence))
        connection.execute(insert(entries).values(row))

    def _known(self, connection: Connection, allocation: str) -> Sequence[Entry]:
        rows = _rows(connection, allocation)
        if not rows:
            raise ValueError(unknown("allocation", allocation, _names(connection)))
        return rows

    def _tally(self, connection: Connection, rows: Sequence[Entry], burning: Mapping[str, int]) -> Balance:
        """The sums. What burns above its reservation counts as it is; what is settled burns no more."""
        settled = {row.reference for row in rows if row.kind == SETTLEMENT}
        used = {key: _natural(amount) for key, amount in burning.items() if key not in settled}
        now = float(connection.execute(select(self._database.now)).scalar_one())
        heard = max(row.time for row in rows if row.kind in (GRANT, SETTLEMENT, CORRECTION))
        return Balance(
            allocation=rows[0].allocation,
            unit=rows[0].unit,
            granted=sum(row.amount for row in rows if row.kind == GRANT),
            settled=sum(row.amount for row in rows if row.kind in (SETTLEMENT, CORRECTION)),
            burning=sum(used.values()),
            committed=sum(max(0, held - used.get(key, 0)) for key, held in _open(rows).items()),
            age=max(0.0, now - heard),
        )


def _rows(connection: Connection, allocation: str) -> Sequence[Entry]:
    query = select(entries).where(entries.c.allocation == allocation).order_by(entries.c.id)
    return [Entry(**row) for row in connection.execute(query).mappings()]


def _names(connection: Connection) -> list[str]:
    query = select(entries.c.allocation).distinct().order_by(entries.c.allocation)
    return list(connection.scalars(query))


def _booked(rows: Sequence[Entry], kind: str, reference: str) -> Entry | None:
    return next((row for row in rows if row.kind == kind and row.reference == reference), None)


def _open(rows: Sequence[Entry]) -> dict[str, int]:
    """Reservations that are neither settled nor released."""
    over = {row.reference for row in rows if row.kind in (SETTLEMENT, RELEASE)}
    return {
        row.reference: row.amount for row in rows if row.kind == RESERVATION and row.reference not in over
    }


def _same(booked: Entry, amount: int) -> None:
    """Raises ValueError: a reference that is booked keeps its amount."""
    if booked.amount != amount:
        figures = [format_units(a, booked.unit, exact=True) for a in (booked.amount, amount)]
        where = f"the {booked.kind} {booked.reference!r} in {booked.allocation!r}"
        raise ValueError(f"{where} is booked with {figures[0]}, not {figures[1]}")


def _natural(amount: int) -> int:
    assert isinstance(amount, int), f"{amount!r}: micro-units are whole"
    if amount < 0:
        raise ValueError(f"{amount} micro-units: an amount cannot be negative")
    return amount
