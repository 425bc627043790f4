"""Who may spend what: grants, reservations, settlements. Append-only, in the event log's database.

Amounts are whole millionths of the allocation's native unit (orchestrator/units.py says why). Law 3:
available = granted - settled - burning - committed, and nothing is submitted without a reservation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select

from orchestrator.books import CORRECTION, GRANT, RELEASE, RESERVATION, SETTLEMENT, Books, Entry, names
from orchestrator.store import Store
from orchestrator.suggest import unknown
from orchestrator.tables import entries
from orchestrator.units import format_units

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
            books = Books(connection, allocation)
            if books.unit not in (None, unit):
                raise ValueError(f"allocation {allocation!r} is counted in {books.unit}s, not in {unit}s")
            booked = books.booked(GRANT, reference)
            if booked is None:
                self._book(books, unit, (GRANT, amount, reference), evidence)
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
            books, unit = self._known(Books(connection, allocation))
            booked = books.booked(RESERVATION, reference)
            if any(books.booked(over, reference) for over in (RELEASE, SETTLEMENT)):
                raise ValueError(f"the reservation {reference!r} in {allocation!r} is over")
            if booked is not None:
                _same(booked, amount)
                return self._tally(books, unit, burning)
            before = self._tally(books, unit, burning)
            if amount > before.available:
                raise Overdraft(before, amount)
            self._book(books, unit, (RESERVATION, amount, reference), NOTHING)
            return self._tally(books, unit, burning)

    def settle(
        self, allocation: str, reference: str, amount: int, evidence: Mapping[str, Any] = NOTHING
    ) -> Settlement:
        """Book what a segment used and free the rest of its reservation, together.

        Raises ValueError when the reference was settled with another amount: that needs `correct`.
        """
        _natural(amount)
        with self._database.writing() as connection:
            books, unit = self._known(Books(connection, allocation))
            booked = books.booked(SETTLEMENT, reference)
            if booked is not None:
                _same(booked, amount)
                freed = books.booked(RELEASE, reference)
                return Settlement(amount, freed.amount if freed else 0, booked.evidence.get("excess", 0))
            held = self._held(books, reference) or 0
            done = Settlement(amount, max(0, held - amount), max(0, amount - held))
            flag = {"excess": done.excess} if done.excess else {}
            self._book(books, unit, (SETTLEMENT, amount, reference), {**evidence, **flag})
            if done.released:
                self._book(books, unit, (RELEASE, done.released, reference), NOTHING)
            return done

    def release(self, allocation: str, reference: str) -> int:
        """Free a reservation that was never used; how much. Nothing happens when it is over already."""
        with self._database.writing() as connection:
            books, unit = self._known(Books(connection, allocation))
            held = self._held(books, reference)
            if held is not None:
                self._book(books, unit, (RELEASE, held, reference), NOTHING)
            return held or 0

    def correct(self, allocation: str, reference: str, amount: int, evidence: Mapping[str, Any]) -> bool:
        """Add to what is settled (or take from it) as accounting says; False when booked already."""
        with self._database.writing() as connection:
            books, unit = self._known(Books(connection, allocation))
            booked = books.booked(CORRECTION, reference)
            if booked is None:
                self._book(books, unit, (CORRECTION, amount, reference), evidence)
            else:
                _same(booked, amount)
            return booked is None

    def balance(self, allocation: str, burning: Mapping[str, int] = NOTHING) -> Balance:
        """What the allocation holds; `burning` is what each segment not settled has used, by reference.

        Raises ValueError, naming the nearest, when there is no such allocation.
        """
        with self._database.reading() as connection:
            return self._tally(*self._known(Books(connection, allocation)), burning)

    def allocations(self) -> list[str]:
        with self._database.reading() as connection:
            return names(connection)

    def entries(self, allocation: str) -> list[Entry]:
        """All lines of an allocation, oldest first."""
        with self._database.reading() as connection:
            return Books(connection, allocation).lines()

    # ---- inside a transaction

    def _book(self, books: Books, unit: str, line: tuple[str, int, str], evidence: Mapping[str, Any]) -> None:
        row = dict(zip(("kind", "amount", "reference"), line, strict=True), allocation=books.allocation)
        row.update(unit=unit, time=self._database.now, evidence=dict(evidence))
        books.connection.execute(insert(entries).values(row))

    def _known(self, books: Books) -> tuple[Books, str]:
        """With their unit."""
        unit = books.unit
        if unit is None:
            raise ValueError(unknown("allocation", books.allocation, names(books.connection)))
        return books, unit

    def _held(self, books: Books, reference: str) -> int | None:
        """What an open reservation holds; None where there is none, or no longer."""
        reserved = books.booked(RESERVATION, reference)
        over = any(books.booked(kind, reference) for kind in (SETTLEMENT, RELEASE))
        return None if reserved is None or over else reserved.amount

    def _tally(self, books: Books, unit: str, burning: Mapping[str, int]) -> Balance:
        """The sums. What burns above its reservation counts as it is; what is settled burns no more."""
        settled = books.settled(list(burning))
        used = {key: _natural(amount) for key, amount in burning.items() if key not in settled}
        now = float(books.connection.execute(select(self._database.now)).scalar_one())
        return Balance(
            allocation=books.allocation,
            unit=unit,
            granted=books.total(GRANT),
            settled=books.total(SETTLEMENT, CORRECTION),
            burning=sum(used.values()),
            committed=sum(max(0, held - used.get(key, 0)) for key, held in books.open_reservations().items()),
            age=max(0.0, now - books.heard()),
        )


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
