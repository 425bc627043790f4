"""Reaching a site: whole answers or Unreachable, whole files or none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from clusters.connection import LocalConnection, Unreachable, parse_answer


def test_the_agent_answers_through_a_process_of_its_own(tmp_path: Path) -> None:
    found = LocalConnection(tmp_path).exchange([{"op": "jobs", "keys": ["k"]}, {"op": "stop", "key": "k"}])
    assert found[0]["jobs"]["k"]["state"] == "absent"
    assert "No such file" in found[1]["error"]


LOOKS = [
    {"op": "watch", "since": {}, "seconds": 0.0},
    {"op": "jobs", "keys": ["k"]},
    {"op": "events", "since": {"k": {}}},
    {"op": "logs", "since": {"k": {}}},
]


def test_to_look_takes_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through_a_process = LocalConnection(tmp_path).exchange([*LOOKS, {"op": "none"}])[:-1]
    monkeypatch.setattr(subprocess, "run", None)
    assert LocalConnection(tmp_path).exchange(LOOKS) == through_a_process


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "stop", "key": "k"},
        {"op": "submit", "segment": "{}"},
        {"op": "cancel", "keys": ["k"], "scheduler": "slurm"},
        {"op": "jobs", "keys": ["k"], "scheduler": "slurm"},
    ],
)
def test_what_does_more_than_look_has_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: dict[str, object]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("started")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(Unreachable, match="started"):
        LocalConnection(tmp_path).exchange([*LOOKS, operation])


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no answer from the agent"):
        LocalConnection(tmp_path, python=str(tmp_path / "none")).exchange([])


def test_an_agent_that_hangs(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with pytest.raises(Unreachable, match="timed out"):
        LocalConnection(tmp_path, python=str(program)).exchange([], timeout=0.3)


GOOD = json.dumps({"protocol": 1, "results": [{"ok": True}]})


@pytest.mark.parametrize(
    ("code", "output", "errors", "why"),
    [
        (0, "", "", "not usable"),
        (0, GOOD[:-3], "", "not usable"),
        (0, GOOD.replace("1", "2"), "", "protocol 2"),
        (0, json.dumps({"protocol": 1, "results": []}), "", "0 of 1 results"),
        (0, "[]", "", "not usable"),
        (2, "", "eurotrain agent: bad request: x\n", "bad request: x"),
        (-9, "", "", "exit code -9"),
    ],
)
def test_what_is_no_answer(code: int, output: str, errors: str, why: str) -> None:
    with pytest.raises(Unreachable, match=why):
        parse_answer(code, output, errors, 1)


def test_a_whole_answer() -> None:
    assert parse_answer(0, GOOD, "", 1) == [{"ok": True}]


def test_files_arrive_whole_or_not_at_all(tmp_path: Path) -> None:
    site = LocalConnection(tmp_path / "site")
    (tmp_path / "a").write_bytes(b"x" * 1000)
    assert site.push(tmp_path / "a", "in/box/a") == 1000
    assert site.fetch("in/box/a", tmp_path / "back") == 1000
    assert (tmp_path / "back").read_bytes() == b"x" * 1000
    with pytest.raises(Unreachable, match="cannot copy"):
        site.fetch("in/box/none", tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "back", "site"]
