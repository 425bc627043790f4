"""How often a site may be called, whoever calls: counts, pauses, refusals; for all processes together."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.connection import Unreachable
from clusters.ssh_budget import Budget, Limits

DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = 100 * DAY

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def budget(folder: Path, clock: Clock, **limits: int) -> Budget:
    return Budget(folder / "ssh" / "site.json", "site", Limits(**limits), clock, lambda: 0.5)


def take(it: Budget, connects: bool = True, credentials: str = "key") -> None:
    it.take(connects, lambda: credentials, "type `ssh site`")


def test_commands_and_connections_are_counted_by_the_day(tmp_path: Path, clock: Clock) -> None:
    it = budget(tmp_path, clock, connections=1, commands=3)
    take(it)
    with pytest.raises(Unreachable, match="site: the day's budget of 1 connections is spent"):
        take(it)
    take(it, connects=False)
    take(it, connects=False)
    with pytest.raises(Unreachable, match="the day's budget of 3 commands is spent"):
        take(it, connects=False)
    assert (it.read().connections, it.read().commands) == (1, 3)
    clock.now += DAY
    take(it)
    assert (it.read().connections, it.read().commands) == (1, 1)


def test_pauses_double_and_end_with_a_success(tmp_path: Path, clock: Clock) -> None:
    it = budget(tmp_path, clock)
    pauses = []
    for _ in range(12):
        it.failed()
        pauses.append(it.read().not_before - clock.now)
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert pauses[-1] == 900.0
    with pytest.raises(Unreachable, match="site: 12 failures in a row, next try in 900 s"):
        take(it)
    take(it, connects=False)  # a session that lives is used all the same
    clock.now += 901
    take(it)
    it.succeeded()
    assert (it.read().failures, it.read().not_before) == (0, 0.0)


def test_who_was_refused_does_not_knock_again_with_the_same_credentials(tmp_path: Path, clock: Clock) -> None:
    it = budget(tmp_path, clock)
    it.was_refused("Permission denied (publickey).", "key")
    clock.now += 30 * DAY
    for _ in range(3):
        with pytest.raises(Unreachable, match=r"site: Permission denied \(publickey\).; type `ssh site`"):
            take(it)
    assert it.read().connections == 0
    take(it, connects=False)  # the operator has opened a session
    take(it, credentials="a new certificate")


def test_credentials_are_looked_at_only_after_a_refusal(tmp_path: Path, clock: Clock) -> None:
    def never() -> str:
        raise AssertionError("ssh-add was called for nothing")

    budget(tmp_path, clock).take(True, never, "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"day": 3}', '{"day": "x", "connections": null}'])
def test_a_file_that_cannot_be_read_begins_anew(tmp_path: Path, clock: Clock, text: str) -> None:
    it = budget(tmp_path, clock)
    it.path.parent.mkdir()
    it.path.write_text(text)
    take(it)
    assert it.read().commands == 1


def many(path: Path) -> None:
    for _ in range(50):
        Budget(path, "site").take(False, str, "")


def test_processes_share_one_count(tmp_path: Path) -> None:
    path = tmp_path / "site.json"
    processes = [multiprocessing.get_context("spawn").Process(target=many, args=(path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert Budget(path, "site").read().commands == 150


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, DAY)), max_size=40), st.integers(1, 5), st.integers(1, 9)
)
def test_no_day_has_more_than_its_budget(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[bool, float]], connections: int, commands: int
) -> None:
    clock = Clock()
    it = budget(tmp_path_factory.mktemp("b"), clock, connections=connections, commands=commands)
    made: dict[int, list[bool]] = {}
    for connects, pause in calls:
        clock.now += pause
        try:
            take(it, connects)
        except Unreachable:
            continue
        made.setdefault(int(clock.now // DAY), []).append(connects)
    for day in made.values():
        assert sum(day) <= connections
        assert len(day) <= commands
