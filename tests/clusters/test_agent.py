"""The agent's protocol: many operations in, as many answers out, whatever happens to one of them."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
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
from tests.clusters.fake_slurm import FakeSlurm
from tests.clusters.test_slurm_records import queued


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


# ---- Slurm


def on_slurm(op: str, **more: Any) -> dict[str, Any]:
    return {"op": op, "scheduler": "slurm", **more}


def test_all_operations_of_a_request_share_one_squeue_and_one_sacct(
    tmp_path: Path, segment: Segment, fake_slurm: FakeSlurm
) -> None:
    fake_slurm.says("squeue", queued(Name="a") + queued(Name="before", JobID="7"))
    results = ask(
        tmp_path,
        on_slurm("jobs", keys=["a", "b"]),
        on_slurm("submit", segment=segment.to_json(), python="py", request={"after": ["before"]}),
        on_slurm("jobs", keys=[segment.key]),
        {"op": "jobs", "keys": ["a"]},
        on_slurm("cancel", keys=["a"]),
    )
    assert all(result["ok"] for result in results), results
    assert [results[0]["jobs"][key]["state"] for key in "ab"] == ["running", "absent"]
    assert results[1]["state"] == results[2]["jobs"][segment.key]["state"] == "pending"
    assert results[3]["jobs"]["a"]["state"] == "absent", "the local scheduler knows nothing of it"
    assert results[4]["cancelled"] == ["1"]
    assert len(fake_slurm.calls("squeue")) == len(fake_slurm.calls("sacct")) == 1
    assert f"--name=a,b,{segment.key},before" in fake_slurm.calls("squeue")[0]


@pytest.mark.parametrize(
    ("operation", "why"),
    [
        (
            {"op": "jobs", "keys": [], "scheduler": "pbs"},
            "jobs: unknown scheduler 'pbs'; known: local, slurm",
        ),
        ({"op": "cancel", "keys": [], "scheduler": "local"}, "cancel: only Slurm's jobs can be cancelled"),
        (on_slurm("submit", segment="{"), "submit: not a segment"),
        (on_slurm("jobs", keys=7), "jobs: "),
        (on_slurm("jobs"), "jobs: "),
        ({"scheduler": "slurm"}, "unknown operation None"),
    ],
)
def test_what_is_wrong_with_an_operation_is_its_own_answer(
    tmp_path: Path, fake_slurm: FakeSlurm, operation: dict[str, Any], why: str
) -> None:
    wrong, fine = ask(tmp_path, operation, on_slurm("jobs", keys=["k"]))
    assert wrong["error"].startswith(why)
    assert fine["jobs"]["k"]["state"] == "absent"


def test_what_slurm_allows(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    line = "PartitionName=b MaxTime=01:00:00 Default=YES"
    fake_slurm.does("scontrol", f"case $2 in partition) echo '{line}';; esac")
    fake_slurm.does("sacctmgr", "exit 1")
    (result,) = ask(tmp_path, {"op": "limits", "account": "p", "partition": "", "qos": "", "keys": []})
    assert result["limits"]["times"] == [(3600.0, "partition b")]
    assert len(fake_slurm.calls("sacctmgr")) == len(fake_slurm.calls("scontrol")) == 2


def test_waiting_jobs_are_kept_away_from_nodes(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("squeue", queued(Name="a", JobID="5", State="PENDING"))
    right, wrong = ask(
        tmp_path,
        on_slurm("exclude", keys=["a"], nodes=["cn1"]),
        {"op": "exclude", "keys": ["a"], "nodes": ["cn1"], "scheduler": "local"},
    )
    assert right == {"ok": True, "excluded": ["5"]}
    assert wrong["error"] == "exclude: only Slurm's jobs have nodes to keep away from"


def test_a_request_with_an_unknown_field_submits_nothing(
    tmp_path: Path, segment: Segment, fake_slurm: FakeSlurm
) -> None:
    (result,) = ask(tmp_path, on_slurm("submit", segment=segment.to_json(), request={"node": 2}))
    assert result["error"].startswith("submit: unknown field 'node' of a Slurm request; known: nodes")
    assert fake_slurm.calls("sbatch") == []


# ---- files


def test_a_file_is_read_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"four")
    small, large = ask(tmp_path, *({"op": "read", "path": "file", "limit": n} for n in (4, 3)))
    digest = {"ok": True, "size": 4, "sha256": hashlib.sha256(b"four").hexdigest()}
    assert small == {**digest, "content": base64.b64encode(b"four").decode()}
    assert large == digest


@pytest.mark.parametrize("brought", [True, False])
def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path: Path, brought: bool) -> None:
    for content, accepted in ((b"new", True), (b"ne", False)):
        source = {"part": "incoming/x"} if brought else {"content": base64.b64encode(content).decode()}
        (tmp_path / "incoming").mkdir(exist_ok=True)
        (tmp_path / "incoming" / "x").write_bytes(content)
        operation = {
            "op": "receive",
            "target": "in/box/f",
            "sha256": hashlib.sha256(b"new").hexdigest(),
            **source,
        }
        (result,) = ask(tmp_path, operation)
        assert result["ok"] == accepted
        assert (tmp_path / "in/box/f").read_bytes() == b"new"
        assert [p.name for p in (tmp_path / "in/box").iterdir()] == ["f"]
        assert not (brought and (tmp_path / "incoming" / "x").exists())
    assert result["error"] == "receive: in/box/f has arrived damaged; what came was thrown away"


def test_room_for_a_file_that_will_be_brought(tmp_path: Path) -> None:
    assert ask(tmp_path, {"op": "expect", "part": "incoming/x"}) == [{"ok": True, "size": 0}]
    (tmp_path / "incoming" / "x").write_bytes(b"half")
    assert ask(tmp_path, {"op": "expect", "part": "incoming/x"}) == [{"ok": True, "size": 4}]


def test_an_agent_that_hangs_ends_by_itself(tmp_path: Path) -> None:
    watch = {"op": "watch", "since": {}, "seconds": 60.0}
    request = {"protocol": agent.PROTOCOL, "scratch": str(tmp_path), "operations": [watch], "timeout": 0.5}
    command = [sys.executable, "-P", "-m", "clusters.agent"]
    began = time.monotonic()
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGALRM
    assert time.monotonic() - began < 15
