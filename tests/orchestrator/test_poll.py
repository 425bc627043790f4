"""Sites are asked side by side, one exchange each; one that fails or dawdles holds up no other."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clusters.agent import answer
from clusters.connection import Unreachable
from orchestrator import poll
from orchestrator.poll import Poller, Question

QUESTION = Question({}, {}, 0.0)


@dataclass
class Wire:
    """A connection whose answers wait until `gate` is open."""

    gate: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    asked: list[tuple[list[dict[str, Any]], float]] = field(default_factory=list)

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        self.asked.append((operations, timeout))
        assert self.gate.wait(30.0)
        if self.error:
            raise self.error
        return [{"ok": True, "number": len(self.asked)}]

    def fetch(self, source: str, target: Path) -> int:
        raise AssertionError

    def push(self, source: Path, target: str) -> int:
        raise AssertionError


@pytest.fixture
def wires() -> dict[str, Wire]:
    return {"fast": Wire(), "slow": Wire()}


@pytest.fixture
def poller(wires: dict[str, Wire]) -> Iterator[Poller]:
    wires["fast"].gate.set()
    poller = Poller(wires)
    yield poller
    wires["slow"].gate.set()
    poller.close()


def test_a_question_looks_jobs_up_before_it_reads_what_they_wrote() -> None:
    """An ended job writes no more: what is read after it was seen ended is all there is."""
    question = Question({"k": {"ranks": 7}, "l": {}}, {"k": {"rank-0000.log": 3}}, 5.0)
    assert question.operations() == [
        {"op": "watch", "since": {"k": {"ranks": 7}, "l": {}}, "seconds": 5.0},
        {"op": "jobs", "keys": ["k", "l"], "scheduler": "local"},
        {"op": "events", "since": {"k": {"ranks": 7}, "l": {}}},
        {"op": "logs", "since": {"k": {"rank-0000.log": 3}}},
    ]


def test_the_agent_understands_a_question(tmp_path: Path) -> None:
    operations = Question({"k": {}}, {"k": {}}, 0.0).operations()
    results = answer({"protocol": 1, "scratch": str(tmp_path), "operations": operations})["results"]
    assert [result["ok"] for result in results] == [True] * 4


def test_answers_come_once(poller: Poller) -> None:
    poller.ask("fast", QUESTION)
    assert poller.answers(30.0) == {"fast": [{"ok": True, "number": 1}]}
    assert poller.answers(0.0) == {}


def test_a_site_has_one_exchange_in_flight(poller: Poller, wires: dict[str, Wire]) -> None:
    for _ in range(5):
        poller.ask("slow", QUESTION)
        poller.answers(0.01)
    assert len(wires["slow"].asked) == 1
    wires["slow"].gate.set()
    assert poller.answers(30.0) == {"slow": [{"ok": True, "number": 1}]}
    poller.ask("slow", QUESTION)
    assert poller.answers(30.0) == {"slow": [{"ok": True, "number": 2}]}


def test_a_slow_site_does_not_delay_another(poller: Poller, wires: dict[str, Wire]) -> None:
    poller.ask("slow", QUESTION)
    for number in range(1, 6):
        poller.ask("fast", QUESTION)
        began = time.monotonic()
        assert poller.answers(30.0) == {"fast": [{"ok": True, "number": number}]}
        assert time.monotonic() - began < 10.0
    assert len(wires["slow"].asked) == 1


def test_waiting_ends_when_the_time_is_over(poller: Poller) -> None:
    for ask in (False, True):
        if ask:
            poller.ask("slow", QUESTION)
        began = time.monotonic()
        assert poller.answers(0.1) == {}
        assert 0.1 <= time.monotonic() - began < 5.0


def test_an_exchange_gets_a_minute_beyond_what_it_waits_at_the_site(
    poller: Poller, wires: dict[str, Wire]
) -> None:
    poller.ask("fast", Question({}, {}, 5.0))
    poller.answers(30.0)
    ((operations, timeout),) = wires["fast"].asked
    assert (operations[0]["seconds"], timeout) == (5.0, 65.0)


# ---- failures


class Clock:
    """Stands in for the module `time`."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(poll, "time", clock)
    return clock


def asked(poller: Poller, wires: dict[str, Wire], site: str = "fast") -> bool:
    """Whether a site is asked now, if one tries."""
    before = len(wires[site].asked)
    poller.ask(site, QUESTION)
    poller.answers(30.0 if poller._flying else 0.0)
    return len(wires[site].asked) > before


def test_an_error_is_an_answer(poller: Poller, wires: dict[str, Wire]) -> None:
    wires["fast"].error = Unreachable("no route")
    poller.ask("fast", QUESTION)
    (error,) = poller.answers(30.0).values()
    assert isinstance(error, Unreachable)
    assert str(error) == "no route"


@pytest.mark.parametrize(("which", "factor"), [(0, 0.5), (1, 1.5)], ids=["shortest", "longest"])
def test_pauses_grow_up_to_five_minutes_and_are_not_the_same_everywhere(
    poller: Poller,
    wires: dict[str, Wire],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    which: int,
    factor: float,
) -> None:
    monkeypatch.setattr(random, "uniform", lambda *bounds: bounds[which])
    wires["fast"].error = Unreachable("no route")
    assert asked(poller, wires)
    for seconds in (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300):
        clock.now += seconds * factor - 0.01
        assert not asked(poller, wires)
        clock.now += 0.02
        assert asked(poller, wires)


def test_an_answer_ends_the_pauses(poller: Poller, wires: dict[str, Wire], clock: Clock) -> None:
    wires["fast"].error = Unreachable("no route")
    for _ in range(8):
        assert asked(poller, wires)
        clock.now += 500.0
    wires["fast"].error = None
    assert asked(poller, wires)
    assert asked(poller, wires)
    wires["fast"].error = Unreachable("no route")
    assert asked(poller, wires)
    clock.now += 1.51  # as after a first failure
    assert asked(poller, wires)


def test_the_pause_of_a_site_is_its_own(poller: Poller, wires: dict[str, Wire], clock: Clock) -> None:
    wires["slow"].gate.set()
    wires["slow"].error = Unreachable("no route")
    assert asked(poller, wires, "slow")
    assert not asked(poller, wires, "slow")
    assert asked(poller, wires, "fast")


def test_an_error_in_our_own_code_is_not_taken_for_a_silent_site(
    poller: Poller, wires: dict[str, Wire]
) -> None:
    wires["fast"].error = KeyError("scratch")
    poller.ask("fast", QUESTION)
    with pytest.raises(KeyError):
        poller.answers(30.0)


def test_closing_waits_for_nobody(wires: dict[str, Wire]) -> None:
    poller = Poller(wires)
    poller.ask("slow", QUESTION)
    began = time.monotonic()
    poller.close()
    assert time.monotonic() - began < 5.0
    assert not wires["slow"].gate.is_set()
    with pytest.raises(RuntimeError, match="after shutdown"):
        poller.ask("fast", QUESTION)
    wires["slow"].gate.set()


def test_a_run_without_sites_can_be_polled() -> None:
    poller = Poller({})
    assert poller.answers(0.0) == {}
    poller.close()
