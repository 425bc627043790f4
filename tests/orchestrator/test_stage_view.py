"""How staging shows itself: rate and time left from what was seen, and what came of it in one table."""

from __future__ import annotations

from pathlib import Path

from orchestrator.stage import Stager
from orchestrator.stage_view import Bars, Lines, facts, table
from orchestrator.stock import Stock
from tests.orchestrator.story import drawn

FILE = {"path": "data/x.bin", "size": 2**20, "sha256": "0123456789abcdef0000", "adopted": False, "age": 0}


def test_lines_tell_rate_and_time_left_but_not_too_often() -> None:
    heard: list[str] = []
    clock = iter([0.0, 1.0, 10.0, 11.0, 20.0])
    lines = Lines(heard.append, lambda: next(clock))
    for done in (100, 110, 200, 210, 300):
        lines.meter("sending", done * 2**20, 300 * 2**20)
    assert heard == [
        "sending: 200 MiB of 300 MiB, 10 MiB/s, 10s left",
        "sending: 300 MiB of 300 MiB, 10 MiB/s",
    ]


def test_what_was_there_before_is_no_rate() -> None:
    heard: list[str] = []
    clock = iter([0.0, 10.0])
    lines = Lines(heard.append, lambda: next(clock))
    lines.meter("sending", 1000, 4000)
    lines.meter("sending", 1000, 4000)
    assert heard == ["sending: 1000 B of 3.91 KiB, 0 B/s"]


def test_every_step_has_a_bar() -> None:
    with Bars() as bars:
        bars.say("a line")
        bars.meter("sending", 1, 4)
        bars.meter("verifying", 2, 4)
        bars.meter("sending", 3, 4)
        assert [(task.description, task.completed) for task in bars._progress.tasks] == [
            ("sending", 3), ("verifying", 2),
        ]  # fmt: skip


def test_the_result_as_json_and_as_a_table(tmp_path: Path) -> None:
    stager = Stager("east", None, Stock(tmp_path))  # type: ignore[arg-type]
    stager.sent = 2**19
    bundle = {"id": "b1b2", "kind": "wheels", "words": "Python 3.11", "bytes": 2**30, "code": "c"}
    told = facts(stager, bundle, [FILE, {**FILE, "path": "data/y.bin", "adopted": True}], 2.0)
    assert list(told) == ["site", "bundle", "files", "bytes", "sent_bytes", "seconds"]
    assert (told["bytes"], told["sent_bytes"]) == (2**21, 2**19)
    text = drawn(table(told))
    assert "staged at east: 2 MiB, 512 KiB of it sent, in 2s" in text
    assert "0123456789abcdef" in text
    assert "was there" in text
    assert "bundle: wheels, Python 3.11" in text
    assert facts(stager, {}, [], 1.0)["bundle"] is None
