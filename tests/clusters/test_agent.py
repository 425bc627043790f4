"""The agent's protocol: many operations in, as many answers out, whatever happens to one of them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import agent
from clusters.events import RANK_DIED, STEP, EventWriter
from clusters.paths import SegmentPaths, SitePaths
from clusters.segment import Segment


def ask(scratch: Path, *operations: dict[str, Any]) -> list[dict[str, Any]]:
    request = {"protocol": agent.PROTOCOL, "scratch": str(scratch), "operations": list(operations)}
    results = agent.answer(request)["results"]
    assert isinstance(results, list)
    return results


def test_one_failure_does_not_stop_the_next(tmp_path: Path) -> None:
    broken, unknown, fine = ask(tmp_path, {"op": "jobs"}, {"op": "dance"}, {"op": "jobs", "keys": ["k"]})
    assert not broken["ok"]
    assert "keys" in broken["error"]
    assert unknown["error"].startswith("unknown operation 'dance'; known: submit, jobs")
    assert fine["jobs"]["k"] == {"state": "absent", "heartbeat_age": None}


def test_a_segment_is_never_replaced_by_another_of_the_same_key(tmp_path: Path, segment: Segment) -> None:
    paths = SitePaths(tmp_path).segment(segment.key)
    paths.root.mkdir(parents=True)
    paths.segment.write_text("something else")
    (result,) = ask(tmp_path, {"op": "submit", "segment": segment.to_json()})
    assert "is here already, with other contents" in result["error"]
    assert paths.segment.read_text() == "something else"


def test_events_come_once_and_whole(tmp_path: Path, paths: SegmentPaths) -> None:
    writer = EventWriter(paths.events / "ranks.jsonl")
    writer.emit(STEP, step=1)
    writer.emit(STEP, step=2)
    with (paths.events / "ranks.jsonl").open("a") as stream:
        stream.write('{"kind": "st')  # still being written
    key = paths.root.name
    (first,) = ask(tmp_path, {"op": "events", "since": {key: {}}})
    block = first["events"][key]["ranks"]
    assert [line["step"] for line in block["lines"]] == [1, 2]
    (second,) = ask(tmp_path, {"op": "events", "since": {key: {"ranks": block["offset"]}}})
    assert second["events"][key] == {}


def test_logs_come_in_pieces_from_an_offset(tmp_path: Path, paths: SegmentPaths) -> None:
    paths.logs.mkdir()
    (paths.logs / "rank-0000.log").write_bytes(b"one\ntwo\n")
    (result,) = ask(tmp_path, {"op": "logs", "since": {paths.root.name: {"rank-0000.log": 4}}})
    assert base64.b64decode(result["logs"][paths.root.name]["rank-0000.log"]) == b"two\n"


def test_stop_leaves_the_marker(tmp_path: Path, paths: SegmentPaths) -> None:
    assert ask(tmp_path, {"op": "stop", "key": paths.root.name}) == [{"ok": True}]
    assert paths.stop.exists()


def watch_while(scratch: Path, key: str, happens: Any) -> float:
    timer = threading.Timer(0.4, happens)
    timer.start()
    began = time.monotonic()
    ask(scratch, {"op": "watch", "since": {key: {}}, "seconds": 10.0})
    timer.join()
    return time.monotonic() - began


def test_watch_returns_at_urgent_news_and_sleeps_through_steps(tmp_path: Path, paths: SegmentPaths) -> None:
    writer = EventWriter(paths.events / "ranks.jsonl")
    writer.emit(STEP, step=1)
    took = watch_while(tmp_path, paths.root.name, lambda: writer.emit(RANK_DIED))
    assert 0.3 < took < 5.0


def test_watch_returns_when_the_job_ends(tmp_path: Path, paths: SegmentPaths) -> None:
    assert 0.3 < watch_while(tmp_path, paths.root.name, lambda: paths.exit.write_text("{}")) < 5.0


def test_watch_gives_up_after_its_time(tmp_path: Path, paths: SegmentPaths) -> None:
    began = time.monotonic()
    ask(tmp_path, {"op": "watch", "since": {paths.root.name: {}}, "seconds": 0.3})
    assert 0.3 <= time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ("", "Expecting value"),
        ("[]", "no attribute"),
        ('{"protocol": 99}', "speaks protocol 1"),
        ("{", "Expecting"),
    ],
)
def test_a_bad_request_gives_one_line_and_code_2(request_: str, why: str) -> None:
    command = [sys.executable, "-P", "-m", "clusters.agent"]
    done = subprocess.run(command, input=request_, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s))
)
def test_any_operation_is_answered(junk: Any) -> None:
    (result,) = ask(Path("/nonexistent"), {"op": "jobs", "keys": junk})
    assert isinstance(result["ok"], bool)
    json.dumps(result)
