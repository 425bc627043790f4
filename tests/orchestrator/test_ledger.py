"""The ledger: nothing is created or lost, nothing is booked twice, nobody overdraws."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.ledger import Balance, Ledger, Overdraft, Settlement
from orchestrator.store import Store

FORK = multiprocessing.get_context("fork")
UNIT = "core-hour"
M = 1_000_000  # micro-units


@pytest.fixture
def ledger(store: Store) -> Ledger:
    made = Ledger(store)
    made.grant("demo-a", 10 * M, UNIT, "2026")
    return made


def figures(balance: Balance) -> tuple[int, int, int, int, int]:
    return balance.granted, balance.settled, balance.burning, balance.committed, balance.available


def test_the_life_of_a_segment(ledger: Ledger) -> None:
    assert figures(ledger.balance("demo-a")) == (10 * M, 0, 0, 0, 10 * M)
    after = ledger.reserve("demo-a", "run.a.0000", 4 * M)
    assert figures(after) == (10 * M, 0, 0, 4 * M, 6 * M)
    burning = ledger.balance("demo-a", {"run.a.0000": M})
    assert figures(burning) == (10 * M, 0, M, 3 * M, 6 * M)
    assert ledger.settle("demo-a", "run.a.0000", 3 * M, {"job_id": "7"}) == Settlement(3 * M, M, 0)
    assert figures(ledger.balance("demo-a", {"run.a.0000": M})) == (10 * M, 3 * M, 0, 0, 7 * M)
    lines = [(e.kind, e.amount, e.reference, e.evidence) for e in ledger.entries("demo-a")]
    assert lines == [
        ("grant", 10 * M, "2026", {}),
        ("reservation", 4 * M, "run.a.0000", {}),
        ("settlement", 3 * M, "run.a.0000", {"job_id": "7"}),
        ("release", M, "run.a.0000", {}),
    ]
    assert {e.unit for e in ledger.entries("demo-a")} == {UNIT}


def test_an_overdraft_is_refused_with_the_figures(ledger: Ledger) -> None:
    ledger.reserve("demo-a", "old", 4 * M)
    ledger.settle("demo-a", "old", 4 * M)
    ledger.reserve("demo-a", "queued", 2 * M)
    with pytest.raises(Overdraft) as caught:
        ledger.reserve("demo-a", "new", 3_200_001, {"queued": M // 2, "unseen": 800_000})
    assert str(caught.value) == (
        "allocation 'demo-a': 3.200001 core-hours asked, 3.2 core-hours available "
        "(granted 10, settled 4, burning 1.3, committed 1.5)"
    )
    assert isinstance(caught.value, ValueError)
    assert (caught.value.asked, caught.value.balance.available) == (3_200_001, 3_200_000)
    assert ledger.balance("demo-a").committed == 2 * M
    ledger.reserve("demo-a", "new", 3_200_000, {"queued": M // 2, "unseen": 800_000})


def test_burning_above_a_reservation_counts_as_it_is(ledger: Ledger) -> None:
    ledger.reserve("demo-a", "k", 2 * M)
    assert figures(ledger.balance("demo-a", {"k": 3 * M})) == (10 * M, 0, 3 * M, 0, 7 * M)


def test_a_settlement_above_the_reservation_is_booked_and_flagged(ledger: Ledger) -> None:
    ledger.reserve("demo-a", "k", 2 * M)
    assert ledger.settle("demo-a", "k", 12 * M, {"job_id": "7"}) == Settlement(12 * M, 0, 10 * M)
    assert figures(ledger.balance("demo-a")) == (10 * M, 12 * M, 0, 0, -2 * M)
    assert ledger.entries("demo-a")[-1].evidence == {"job_id": "7", "excess": 10 * M}
    with pytest.raises(Overdraft, match=r"0.000001 core-hours asked, -2 core-hours available"):
        ledger.reserve("demo-a", "next", 1)


def test_use_without_a_reservation_is_booked_and_flagged(ledger: Ledger) -> None:
    assert ledger.settle("demo-a", "never reserved", M) == Settlement(M, 0, M)
    ledger.reserve("demo-a", "k", 2 * M)
    ledger.release("demo-a", "k")
    assert ledger.settle("demo-a", "k", M) == Settlement(M, 0, M)  # it ran after all
    assert figures(ledger.balance("demo-a")) == (10 * M, 2 * M, 0, 0, 8 * M)


def test_everything_may_be_repeated(ledger: Ledger) -> None:
    assert not ledger.grant("demo-a", 10 * M, UNIT, "2026")
    for _ in range(2):
        ledger.reserve("demo-a", "k", 4 * M)
    for _ in range(2):
        assert ledger.settle("demo-a", "k", 6 * M) == Settlement(6 * M, 0, 2 * M)
    ledger.reserve("demo-a", "l", 2 * M)
    assert [ledger.settle("demo-a", "l", M) for _ in range(2)] == [Settlement(M, M, 0)] * 2
    assert ledger.release("demo-a", "l") == 0
    ledger.reserve("demo-a", "m", 2 * M)
    assert [ledger.release("demo-a", "m") for _ in range(2)] == [2 * M, 0]
    assert [ledger.correct("demo-a", "june", -M, {}) for _ in range(2)] == [True, False]
    assert figures(ledger.balance("demo-a")) == (10 * M, 6 * M, 0, 0, 4 * M)
    assert len(ledger.entries("demo-a")) == 9


def test_a_reference_keeps_its_amount(ledger: Ledger) -> None:
    ledger.reserve("demo-a", "k", 4 * M)
    with pytest.raises(ValueError, match="reservation 'k' in 'demo-a' is booked with 4 core-hours, not 5"):
        ledger.reserve("demo-a", "k", 5 * M)
    ledger.settle("demo-a", "k", M)
    with pytest.raises(ValueError, match="settlement 'k' in 'demo-a' is booked with 1 core-hour, not 2"):
        ledger.settle("demo-a", "k", 2 * M)
    with pytest.raises(ValueError, match="the grant '2026' in 'demo-a' is booked with 10 core-hours, not 11"):
        ledger.grant("demo-a", 11 * M, UNIT, "2026")
    with pytest.raises(ValueError, match="the reservation 'k' in 'demo-a' is over"):
        ledger.reserve("demo-a", "k", 4 * M)


def test_a_released_reference_cannot_be_reserved_again(ledger: Ledger) -> None:
    ledger.reserve("demo-a", "k", M)
    ledger.release("demo-a", "k")
    with pytest.raises(ValueError, match="is over"):
        ledger.reserve("demo-a", "k", M)


def test_allocations_are_apart_and_named(ledger: Ledger) -> None:
    ledger.grant("demo-b", 5 * M, "node-hour", "2026")
    ledger.reserve("demo-b", "k", M)
    assert ledger.balance("demo-a").available == 10 * M
    assert ledger.balance("demo-b").unit == "node-hour"
    assert ledger.allocations() == ["demo-a", "demo-b"]
    for act in (
        lambda: ledger.balance("demo-x"),
        lambda: ledger.reserve("demo-x", "k", 1),
        lambda: ledger.settle("demo-x", "k", 1),
        lambda: ledger.release("demo-x", "k"),
        lambda: ledger.correct("demo-x", "k", 1, {}),
    ):
        with pytest.raises(ValueError, match=r"'demo-x': did you mean 'demo-[ab]'\? Known: demo-a, demo-b"):
            act()


def test_grants_add_up_in_one_unit(ledger: Ledger) -> None:
    assert ledger.grant("demo-a", 5 * M, UNIT, "extension", {"letter": "L-7"})
    assert ledger.balance("demo-a").granted == 15 * M
    with pytest.raises(ValueError, match="allocation 'demo-a' is counted in core-hours, not in node-hours"):
        ledger.grant("demo-a", M, "node-hour", "other")
    for nothing in (0, -M):
        with pytest.raises(ValueError, match="it must be above 0"):
            ledger.grant("demo-a", nothing, UNIT, "nothing")


def test_amounts_are_whole_and_natural(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        ledger.reserve("demo-a", "k", -1)
    with pytest.raises(ValueError, match="cannot be negative"):
        ledger.settle("demo-a", "k", -1)
    with pytest.raises(ValueError, match="cannot be negative"):
        ledger.balance("demo-a", {"k": -1})
    with pytest.raises(AssertionError):
        ledger.reserve("demo-a", "k", 0.5)  # type: ignore[arg-type]
    ledger.reserve("demo-a", "k", 0)  # a site that charges nothing


def test_a_balance_has_the_age_of_its_newest_evidence(ledger: Ledger) -> None:
    time.sleep(0.15)
    assert ledger.balance("demo-a").age >= 0.15
    ledger.reserve("demo-a", "k", M)  # our own doing is no evidence
    assert ledger.balance("demo-a").age >= 0.15
    ledger.settle("demo-a", "k", M)
    assert ledger.balance("demo-a").age < 0.15


def test_exact_where_floats_drift(ledger: Ledger) -> None:
    assert sum([0.1] * 100) != 10.0
    for n in range(100):
        ledger.reserve("demo-a", f"k{n}", 100_000)
    assert ledger.balance("demo-a").available == 0
    with pytest.raises(Overdraft):
        ledger.reserve("demo-a", "k100", 1)


def test_processes_that_reserve_at_once_never_overdraw(location: str) -> None:
    setup = Store(location)
    Ledger(setup).grant("demo-a", 7 * M, UNIT, "2026")
    setup.close()
    gate, wins = FORK.Barrier(5), FORK.Value("i", 0)

    def reserve(who: int) -> None:
        store = Store(location)
        ledger = Ledger(store)
        gate.wait()
        for n in range(6):
            try:
                ledger.reserve("demo-a", f"{who}.{n}", M)
            except Overdraft:
                continue
            with wins.get_lock():
                wins.value += 1
        store.close()

    processes = [FORK.Process(target=reserve, args=(who,)) for who in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 5
    store = Store(location)
    assert figures(Ledger(store).balance("demo-a")) == (7 * M, 0, 0, 7 * M, 0)
    assert wins.value == 7
    store.close()


def test_processes_that_settle_the_same_segment_at_once(location: str) -> None:
    setup = Store(location)
    Ledger(setup).grant("demo-a", 7 * M, UNIT, "2026")
    for n in range(5):
        Ledger(setup).reserve("demo-a", f"k{n}", M)
    setup.close()
    gate = FORK.Barrier(4)

    def settle() -> None:
        store = Store(location)
        gate.wait()
        for n in range(5):
            assert Ledger(store).settle("demo-a", f"k{n}", M // 4) == Settlement(M // 4, M - M // 4, 0)
        store.close()

    processes = [FORK.Process(target=settle) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    store = Store(location)
    assert figures(Ledger(store).balance("demo-a")) == (7 * M, 5 * M // 4, 0, 0, 7 * M - 5 * M // 4)
    store.close()


# ---- any order, any repetition

KEYS = st.sampled_from(["k1", "k2", "k3"])
AMOUNTS = st.integers(0, 12)


class Books(RuleBasedStateMachine):
    """Drives a ledger at random beside a model of plain dictionaries, which books nothing twice either."""

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="eurotrain-books-"))
        self.store = Store(self.folder / "x.db")
        self.ledger = Ledger(self.store)
        self.ledger.grant("a", 20, UNIT, "first")
        self.grants, self.corrections = {"first": 20}, dict[str, int]()
        self.reserved, self.released, self.settled = dict[str, int](), dict[str, int](), dict[str, int]()
        self.burning = dict[str, int]()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    def available(self) -> int:
        used = {k: b for k, b in self.burning.items() if k not in self.settled}
        held = {k: r for k, r in self.reserved.items() if k not in self.settled and k not in self.released}
        spoken_for = sum(max(held.get(k, 0), used.get(k, 0)) for k in held.keys() | used.keys())
        gone = sum(self.settled.values()) + sum(self.corrections.values())
        return sum(self.grants.values()) - gone - spoken_for

    @rule(reference=st.sampled_from(["first", "second"]), amount=st.integers(1, 20))
    def grant(self, reference: str, amount: int) -> None:
        self._either(self.grants, reference, amount, lambda: self.ledger.grant("a", amount, UNIT, reference))

    @rule(reference=st.sampled_from(["june", "july"]), amount=st.integers(-5, 5))
    def correct(self, reference: str, amount: int) -> None:
        self._either(
            self.corrections, reference, amount, lambda: self.ledger.correct("a", reference, amount, {})
        )

    @rule(key=KEYS, amount=AMOUNTS)
    def reserve(self, key: str, amount: int) -> None:
        room = self.available()
        over = key in self.settled or key in self.released
        if over or self.reserved.get(key, amount) != amount:
            with pytest.raises(ValueError, match=r"over|booked"):
                self.ledger.reserve("a", key, amount, self.burning)
        elif key not in self.reserved and amount > room:
            with pytest.raises(Overdraft):
                self.ledger.reserve("a", key, amount, self.burning)
        else:
            self.ledger.reserve("a", key, amount, self.burning)
            self.reserved[key] = amount

    @rule(key=KEYS, amount=AMOUNTS)
    def settle(self, key: str, amount: int) -> None:
        self._either(self.settled, key, amount, lambda: self.ledger.settle("a", key, amount))

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        freed = self.ledger.release("a", key)
        if key in self.reserved and key not in self.settled and key not in self.released:
            assert freed == self.reserved[key]
            self.released[key] = freed
        else:
            assert freed == 0

    @rule(key=KEYS, amount=AMOUNTS)
    def burn(self, key: str, amount: int) -> None:
        self.burning[key] = amount

    def _either(self, booked: dict[str, int], reference: str, amount: int, act: Callable[[], object]) -> None:
        """The first amount of a reference is booked, the same again changes nothing, another is refused."""
        if booked.get(reference, amount) != amount:
            with pytest.raises(ValueError, match="booked"):
                act()
        else:
            act()
            booked[reference] = amount

    @invariant()
    def nothing_is_created_or_lost(self) -> None:
        if not hasattr(self, "ledger"):
            return
        balance = self.ledger.balance("a", self.burning)
        assert balance.granted == sum(self.grants.values())
        assert balance.settled == sum(self.settled.values()) + sum(self.corrections.values())
        assert balance.available == self.available()
        assert balance.granted == balance.available + balance.settled + balance.burning + balance.committed

    @invariant()
    def the_lines_tell_the_same(self) -> None:
        """A reservation that is over has been used or given back, to the last micro-unit."""
        if not hasattr(self, "ledger"):
            return
        by_kind = {(e.kind, e.reference): e.amount for e in self.ledger.entries("a")}
        for (kind, key), amount in by_kind.items():
            if kind == "reservation" and ("settlement", key) in by_kind and key not in self.released:
                used = min(amount, by_kind["settlement", key])
                assert amount == used + by_kind.get(("release", key), 0)


Books.TestCase.settings = settings(
    max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBooks = Books.TestCase
