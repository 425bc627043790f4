"""What a child tells its parent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints.lines import exit_code, tell
from checkpoints.manifest import Damaged


def test_a_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    tell(bytes=3, path="a\nb")
    tell(done=True)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"bytes": 3, "path": "a\nb"}, {"done": True}]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("no such axis\n  (allowed: tp)"), 2, "no such axis (allowed: tp)\n"),
        (Damaged(Path("/x"), "torn"), 2, "/x: torn\n"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device\n"),
    ],
)
def test_failures_are_one_line(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert exit_code(work) == code
    assert capsys.readouterr().err == line


def test_a_fault_of_ours_is_not_dressed_up() -> None:
    with pytest.raises(KeyError):
        exit_code(lambda: {}["no such key"])
    assert exit_code(lambda: 17) == 0
