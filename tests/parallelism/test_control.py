"""Decisions of several ranks: equal on all of them, whatever each one sees."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clusters.paths import SegmentPaths
from parallelism import control, device
from parallelism.control import Control
from tests.parallelism.forked import Ranks

pytestmark = pytest.mark.ranks


def controlled(root: Path, function: Callable[[Control], Any]) -> Any:
    here = device.pick()
    device.join(here, int(os.environ["WORLD_SIZE"]))
    return function(Control(SegmentPaths(root), here))


def sums(one: Control) -> tuple[list[float], bool, bool]:
    first = one.sum(one.rank + 1, 0.1)
    before = one.draining
    if one.rank == 1:
        one.paths.drain.touch()  # rank 0 may see it in the next sum or not, in the one after it does
    one.sum()
    one.sum()
    return first, before, one.draining


def test_sums_carry_the_drain_marker(ranks: Ranks, tmp_path: Path) -> None:
    for first, before, after in ranks.run(3, controlled, tmp_path, sums):
        assert first == pytest.approx([6.0, 0.3])
        assert (before, after) == (False, True)


def leads(one: Control) -> tuple[Any, Any, Any]:
    problems = [None, None, "second"] if one.rank else [None, "first", "third"]
    return (
        one.from_leader(lambda: f"from {one.rank}"),
        one.first_problem(problems[1]),
        one.first_problem(problems[2]),
    )


def test_the_leader_looks_and_the_first_problem_is_told(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, controlled, tmp_path, leads) == [("from 0", "first", "third")] * 2
    assert ranks.run(2, controlled, tmp_path, lambda one: one.first_problem(None)) == [None, None]
    only_last = partial(
        controlled, tmp_path, lambda one: one.first_problem("mine" if one.rank == 2 else None)
    )
    assert ranks.run(3, only_last) == ["mine"] * 3


def waits(one: Control, path: Path, seconds: float) -> tuple[bool, bool, float]:
    began = time.monotonic()
    there = one.wait_for(path.exists if one.leads else _never_asked, seconds)
    return there, one.draining, time.monotonic() - began


def _never_asked() -> bool:
    raise AssertionError("only rank 0 looks")


def test_a_wait_ends_with_what_arrives(ranks: Ranks, tmp_path: Path) -> None:
    awaited = tmp_path / "awaited"
    ranks.start(2, controlled, tmp_path, partial(waits, path=awaited, seconds=60.0))
    time.sleep(0.5)
    awaited.touch()
    for there, draining, seconds in ranks.results():
        assert (there, draining) == (True, False)
        assert seconds < 30


def test_a_wait_ends_with_the_deadline_or_a_drain(ranks: Ranks, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for there, draining, seconds in ranks.run(
        2, controlled, tmp_path, partial(waits, path=absent, seconds=0.3)
    ):
        assert (there, draining) == (False, False)
        assert 0.2 < seconds < 30
    (tmp_path / "drain").touch()
    for there, draining, seconds in ranks.run(
        2, controlled, tmp_path, partial(waits, path=absent, seconds=60.0)
    ):
        assert (there, draining) == (False, True)
        assert seconds < 30


def test_the_leader_gives_signs_of_life(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who wait do so in a collective, which has a timeout of its own."""
    monkeypatch.setattr(control, "_SIGN_OF_LIFE_SECONDS", 0.1)
    calls = ranks.run(2, controlled, tmp_path, count_broadcasts)
    assert calls[0] == calls[1]
    assert 3 <= calls[0] <= 11


def count_broadcasts(one: Control) -> int:
    original, calls = one.from_leader, []

    def counted(look: Callable[[], Any]) -> Any:
        calls.append(look)
        return original(look)

    one.from_leader = counted  # type: ignore[method-assign]
    one.wait_for(lambda: False, 1.0)
    return len(calls)
