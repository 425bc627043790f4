"""Streams of events: whatever is written, however it is cut, every line is read once and none vanishes."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.events import CHECKPOINT_SAVED, GARBLED, STEP, EventWriter, read_events


def read_all(path: Path, offset: int = 0, limit: int = 4 << 20) -> list[dict[str, Any]]:
    """All events, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        page, after = read_events(path, offset, limit)
        if after == offset:
            return found
        found, offset = found + page, after


def test_an_event_has_a_time_a_kind_and_its_facts(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "new" / "events" / "ranks.jsonl")
    before = time.time()
    writer.emit(STEP, step=1, loss=2.5)
    ((event,), offset) = read_events(writer.path)
    assert before <= event.pop("time") <= time.time()
    assert event == {"kind": STEP, "step": 1, "loss": 2.5, "offset": 0}
    assert offset == writer.path.stat().st_size


def test_a_stream_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none.jsonl", 7) == ([], 7)


def test_reading_goes_on_where_it_left_off(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "x.jsonl")
    writer.emit(STEP, step=1)
    _, offset = read_events(writer.path)
    assert read_events(writer.path, offset) == ([], offset)
    writer.emit(STEP, step=2)
    ((event,), _) = read_events(writer.path, offset)
    assert (event["step"], event["offset"]) == (2, offset)


def test_an_offset_names_its_line_for_ever(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "x.jsonl")
    for step in range(20):
        writer.emit(STEP, step=step)
    events = read_all(writer.path)
    for event in events:
        assert read_events(writer.path, event["offset"])[0][0] == event


def test_a_page_holds_whole_lines_and_at_most_the_limit(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "x.jsonl")
    for step in range(50):
        writer.emit(STEP, step=step)
    page, offset = read_events(writer.path, limit=300)
    assert 0 < offset <= 300
    assert [e["step"] for e in page] == list(range(len(page)))
    assert [e["step"] for e in read_all(writer.path, limit=300)] == list(range(50))


def test_a_line_longer_than_the_limit_does_not_stop_the_stream(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "x.jsonl")
    writer.emit(STEP, text="x" * 1000)
    writer.emit(CHECKPOINT_SAVED)
    assert [e["kind"] for e in read_all(writer.path, limit=64)] == [STEP, CHECKPOINT_SAVED]


def test_a_line_still_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    line = json.dumps({"time": 1.0, "kind": STEP}).encode() + b"\n"
    path.write_bytes(line + line[:9])
    _, offset = read_events(path)
    assert offset == len(line)
    assert read_events(path, offset, limit=4) == ([], offset)
    path.write_bytes(line + line)
    assert [e["offset"] for e in read_events(path, offset)[0]] == [len(line)]


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"null", b"[]", b"{}", b'{"kind": 1}', b"\xff\xfe", b"\0" * 5, b"[" * 100_000, b"9" * 5000],
    ids=lambda line: repr(line[:8]),
)
def test_a_line_that_is_no_event_is_told_of(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    good = b'{"kind": "step"}\n'
    path.write_bytes(good + line + b"\n" + good)
    first, garbled, last = read_all(path)
    assert (first["kind"], last["kind"], last["offset"]) == (STEP, STEP, len(good) + len(line) + 1)
    text = (line + b"\n")[:200].decode(errors="replace")
    assert garbled == {"kind": GARBLED, "text": text, "time": 0.0, "offset": len(good)}


def test_a_new_writer_ends_the_torn_line_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    EventWriter(path).emit(STEP, step=1)
    with path.open("ab") as stream:
        stream.write(b'{"time": 1, "kind": "st')
    EventWriter(path).emit(STEP, step=2)
    assert [(e["kind"], e.get("step")) for e in read_all(path)] == [(STEP, 1), (GARBLED, None), (STEP, 2)]


def test_a_new_writer_adds_nothing_to_a_whole_stream(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    EventWriter(path)
    assert path.read_bytes() == b""
    EventWriter(path).emit(STEP)
    size = path.stat().st_size
    EventWriter(path)
    assert path.stat().st_size == size


def emit_for_ever(path: Path) -> None:
    writer, step = EventWriter(path), 0
    while True:
        step += 1
        writer.emit(STEP, step=step, padding="x" * 3000)


def test_a_writer_that_is_killed_tears_its_last_line_at_most(tmp_path: Path) -> None:
    """The kernel may end a killed process between two pages of one write."""
    path, kills = tmp_path / "x.jsonl", 8
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=emit_for_ever, args=(path,))
        process.start()
        began = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < began + 20_000:
            time.sleep(0.001)
        process.kill()
        process.join()
    EventWriter(path)
    lives: list[list[dict[str, Any]]] = []
    for event in read_all(path):
        if event.get("step") == 1:
            lives.append([])
        lives[-1].append(event)
    assert len(lives) == kills
    for events in lives:
        last = len(events) - (events[-1]["kind"] == GARBLED)
        assert [event.get("step") for event in events[:last]] == list(range(1, last + 1))


lines = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.text(max_size=5), "time": st.floats(0, 1e9)}, optional={"x": st.text()}
    ).map(lambda event: json.dumps(event).encode()),
    st.binary(max_size=30).map(lambda junk: junk.replace(b"\n", b" ")),
)


@given(st.lists(lines, max_size=8), st.lists(st.integers(0, 400), max_size=8), st.integers(1, 100))
def test_no_split_of_the_writes_changes_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, written: list[bytes], cuts: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    text = b"".join(line + b"\n" for line in written)
    (folder / "whole.jsonl").write_bytes(text)
    growing, found, offset = folder / "growing.jsonl", [], 0
    for cut in [*sorted(cuts), len(text)]:
        growing.write_bytes(text[: max(cut, 0)])
        page, offset = read_events(growing, offset, limit)
        found += page
    found += read_all(growing, offset, limit)
    assert found == read_all(folder / "whole.jsonl")
    assert len(found) >= len(written)
