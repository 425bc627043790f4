"""The local scheduler, with real submitit jobs that run a small stand-in for guard and supervisor."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from clusters import local
from clusters.connection import LocalConnection
from clusters.paths import SegmentPaths, write_atomically
from clusters.segment import Segment


def stand_in(folder: Path, script: str) -> str:
    """An interpreter for the job that runs `script` whatever it is asked to run."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def wait_for(paths: SegmentPaths, state: str, seconds: float = 20.0) -> dict[str, object]:
    deadline = time.monotonic() + seconds
    while (answer := local.look_up(paths))["state"] != state:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)
    return answer


def end(folder: Path) -> None:
    """Kill the stand-in; submitit itself lets SIGTERM pass by."""
    pid = folder / "pid"
    deadline = time.monotonic() + 20
    while not (pid.exists() and pid.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "the job never ran"
        time.sleep(0.05)
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_an_unknown_key_is_absent(paths: SegmentPaths) -> None:
    assert local.look_up(paths) == {"state": "absent"}


def test_the_job_runs_the_guard_around_the_supervisor(segment: Segment, paths: SegmentPaths) -> None:
    command = local.job_command(segment, paths, "py")
    assert command[:5] == ["py", "-P", "-m", "clusters.guard", "--time-limit=60.0"]
    assert command[command.index("--") + 1 :] == [
        "py",
        "-P",
        "-m",
        "orchestrator.supervisor",
        str(paths.root),
    ]


def test_submitting_twice_starts_one_job(segment: Segment, paths: SegmentPaths, tmp_path: Path) -> None:
    python = stand_in(tmp_path, f"echo x >> {tmp_path}/starts; echo $$ > {tmp_path}/pid; exec sleep 30")
    first = local.submit(segment, paths, python)
    try:
        assert first["state"] in ("pending", "running")
        again = local.submit(segment, paths, python)
        assert again["job_id"] == first["job_id"]
    finally:
        end(tmp_path)
    wait_for(paths, "ended")
    assert (tmp_path / "starts").read_text() == "x\n"


def test_the_answer_to_a_submission_does_not_wait_for_the_job(
    segment: Segment, paths: SegmentPaths, tmp_path: Path
) -> None:
    """The job must hold none of the agent's pipes."""
    python = stand_in(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 30")
    operation = {"op": "submit", "segment": segment.to_json(), "python": python}
    (result,) = LocalConnection(Path(segment.scratch)).exchange([operation], timeout=15)
    end(tmp_path)
    assert result["state"] in ("pending", "running")
    wait_for(paths, "ended")


def test_a_job_that_left_no_record_ended_at_its_last_heartbeat(
    segment: Segment, paths: SegmentPaths, tmp_path: Path
) -> None:
    local.submit(segment, paths, stand_in(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 30"))
    paths.heartbeat.touch()
    os.utime(paths.heartbeat, (1e9, 1e9))
    end(tmp_path)
    ended = wait_for(paths, "ended")
    assert ended["ended"] == 1e9
    assert ended["outcome"] == "failed"
    assert "no exit.json" in str(ended["evidence"])


def test_a_submission_whose_record_was_lost_is_found_by_its_claim(paths: SegmentPaths) -> None:
    """The agent died between submitit and job.json; the supervisor has claimed the key."""
    paths.claim.write_text(json.dumps({"pid": os.getpid(), "started": time.time(), "job_id": "77"}))
    assert local.look_up(paths)["state"] == "running"


def test_a_reused_pid_is_not_the_job(paths: SegmentPaths) -> None:
    """The record was written long before the process that has its pid now began."""
    paths.claim.write_text(json.dumps({"pid": os.getpid(), "started": 1e9}))
    assert local.look_up(paths)["state"] == "ended"


def test_the_exit_record_has_the_last_word(paths: SegmentPaths) -> None:
    write_atomically(
        paths.root / "job.json", json.dumps({"job_id": str(os.getpid()), "submitted": time.time()})
    )
    record = {"start": 1.0, "end": 5.0, "exit_code": 0, "outcome": "completed"}
    write_atomically(paths.exit, json.dumps(record))
    answer = local.look_up(paths)
    assert (answer["state"], answer["started"], answer["ended"]) == ("ended", 1.0, 5.0)


def test_a_torn_record_is_no_record(paths: SegmentPaths) -> None:
    (paths.root / "job.json").write_text('{"job_id": "12')
    assert local.look_up(paths) == {"state": "absent"}
