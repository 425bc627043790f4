from __future__ import annotations

from pathlib import Path

from orchestrator.rank_logs import last_line, rank_log, tail


def test_the_end_of_a_log_is_told(tmp_path: Path) -> None:
    rank_log(tmp_path, 3).write_bytes(b"x" * 1000 + b"\nthe \xff reason\n\n")
    assert tail(tmp_path, 3).startswith("; rank-0003.log ends: xxx")
    assert tail(tmp_path, 3).endswith("\nthe \ufffd reason")
    assert len(tail(tmp_path, 3)) < 700


def test_the_last_line_is_told_as_the_rank_wrote_it(tmp_path: Path) -> None:
    rank_log(tmp_path, 0).write_text("warming up\neurotrain: no such file\n\n")
    assert last_line(tmp_path, 0) == "no such file"


def test_without_a_word_there_is_none(tmp_path: Path) -> None:
    rank_log(tmp_path, 1).touch()
    assert [tail(tmp_path, rank) for rank in (None, 0, 1)] == ["", "", ""]
    assert last_line(tmp_path, 0) == last_line(tmp_path, 1) == "bad input, and no word about it"
