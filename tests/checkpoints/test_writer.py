"""The writer process's own work, in this process: what it tells, and what it leaves behind."""

from __future__ import annotations

import json
import mmap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from checkpoints import attempts, writer
from checkpoints.attempts import Retention, candidates, survey
from checkpoints.image import pack, write_image
from checkpoints.manifest import MANIFEST
from checkpoints.writer import Commit, GivenUp, Order, serve, work

PLACES = pack([("t", (4,), (0,), (4,), "uint8")])
IMAGE = memoryview(mmap.mmap(-1, 4096))


def order(attempt: Path, *, number: int = 0, writers: int = 1, lead: bool = True, step: int = 1) -> Order:
    lead_order = Commit(writers, {"step": step}, 0.2, Retention(2)) if lead else None
    return Order(attempt, "a save", number, PLACES, lead_order)


def beat() -> None:
    pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(writer, "tell", lambda **facts: lines.append(facts))
    return lines


def message(given: Order, lost: str | None = None) -> tuple[memoryview, str]:
    """A buffer with the order behind an image, and the line that tells where."""
    text = json.dumps({**asdict(given), "attempt": str(given.attempt)}).encode()
    memory = memoryview(mmap.mmap(-1, 1 << 16))
    memory[4096 : 4096 + len(text)] = text
    return memory, json.dumps({"buffer": 0, "position": 4096, "length": len(text), "lost": lost})


def test_an_order_is_read_from_behind_its_image(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    memory, line = message(order(tmp_path / "a.0001"))
    serve([memory], [line])
    (done,) = (line["done"] for line in told if "done" in line)
    assert done == {"bytes": 4, "facts": {"step": 1}, "kept": [{"step": 1}]}
    assert candidates(tmp_path) == [tmp_path / "a.0001"]


def test_a_fault_of_ours_costs_one_order(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, line = message(order(tmp_path / "a.0001"))
    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_image", lambda *_: 1 / 0)
        serve([memory], [line])
    serve([memory], [line])
    answers = [line for line in told if "beat" not in line]
    assert answers[0] == {"failed": "writer 0: ZeroDivisionError('division by zero')"}
    assert "done" in answers[1]


def test_what_is_kept_is_told_newest_first(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        told = work(order(tmp_path / f"step-{step}.0001", step=step), IMAGE, None, beat)
    assert told["kept"] == [{"step": 11}, {"step": 10}]
    assert [path.name for path in candidates(tmp_path)] == ["step-11.0001", "step-10.0001"]


def test_a_checkpoint_that_cannot_be_pruned_after_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "step-1")

    monkeypatch.setattr(writer, "prune", refuse)
    assert work(order(tmp_path / "a.0001"), IMAGE, None, beat)["bytes"] == 4
    assert capsys.readouterr().err == "checkpoints: cannot prune: step-1: Permission denied\n"


# ---- an order whose writer died


def test_dead_before_its_receipt(tmp_path: Path) -> None:
    (tmp_path / "a.0001").mkdir()
    (tmp_path / "a.0001" / "writer-00000.bin").write_bytes(b"half")
    with pytest.raises(GivenUp, match="writer 0: it died"):
        work(order(tmp_path / "a.0001"), IMAGE, "it died", beat)
    assert list(tmp_path.iterdir()) == []


def test_dead_after_its_receipt(tmp_path: Path) -> None:
    """Then all parts may be there, and the leader's new writer commits them."""
    attempt = tmp_path / "a.0001"
    attempts.durable_directory(attempt)
    write_image(attempt, 0, PLACES, IMAGE, {"save": "a save"})
    assert work(order(attempt), IMAGE, "it died", beat)["bytes"] == 4
    assert candidates(tmp_path) == [attempt]


def test_dead_after_the_manifest(tmp_path: Path) -> None:
    attempt = tmp_path / "a.0001"
    first = work(order(attempt), IMAGE, None, beat)
    text = (attempt / MANIFEST).read_text()
    assert work(order(attempt), IMAGE, "it died", beat) == first
    assert (attempt / MANIFEST).read_text() == text


def test_a_part_that_is_there_needs_no_second_writing(tmp_path: Path) -> None:
    attempt = tmp_path / "a.0001"
    given = order(attempt, number=1, writers=2, lead=False)
    work(given, IMAGE, None, beat)
    assert work(given, IMAGE, "it died", beat) == {}


def test_another_writers_note_is_the_reason(tmp_path: Path) -> None:
    attempt = tmp_path / "a.0001"
    with pytest.raises(GivenUp, match=r"^no luck$"):
        work(order(attempt, number=1, writers=2, lead=False), IMAGE, "no luck", beat)
    with pytest.raises(GivenUp, match=r"^writer 1: no luck$"):
        work(order(attempt, writers=2), IMAGE, None, beat)
    assert list(tmp_path.iterdir()) == [], "a failed attempt takes space"


def test_no_sign(tmp_path: Path) -> None:
    """The attempt stays: its writer may still be at it."""
    beats: list[int] = []
    with pytest.raises(GivenUp, match=r"^writer 1, 2: not a sign for 0 s$"):
        work(order(tmp_path / "a.0001", writers=3), IMAGE, None, lambda: beats.append(1))
    assert len(beats) > 2, "its rank would think that it hangs"
    assert survey(tmp_path).uncommitted == [tmp_path / "a.0001"]


def test_a_manifest_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(attempts, "write_durably", full)
    with pytest.raises(OSError, match="No space left on device"):
        work(order(tmp_path / "a.0001"), IMAGE, None, beat)
    assert list(tmp_path.iterdir()) == []
