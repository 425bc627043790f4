"""Asking Slurm: once for all keys, in time, and with what the segment's own files add."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from clusters import slurm_queue
from clusters.paths import SegmentPaths, SitePaths
from clusters.slurm_queue import LAG_SECONDS, Queue, ask, commands, with_files
from clusters.slurm_records import SACCT_FIELDS, SQUEUE_FIELDS
from tests.clusters.fake_slurm import FakeSlurm
from tests.clusters.test_slurm_records import booked, queued


def test_many_keys_are_asked_for_at_once(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("squeue", queued(Name="a") + queued(Name="b", State="PENDING"))
    fake_slurm.says("sacct", booked(JobName="c", State="TIMEOUT"))
    queue = Queue(SitePaths(tmp_path), ["a", "b", "c", "d"])
    assert [queue.look_up(key)["state"] for key in "abcd"] == ["running", "pending", "ended", "absent"]
    assert len(fake_slurm.calls("squeue")) == len(fake_slurm.calls("sacct")) == 1
    for name in ("squeue", "sacct"):
        assert "--name=a,b,c,d" in fake_slurm.calls(name)[0]


def test_nothing_is_asked_before_it_is_needed(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    Queue(SitePaths(tmp_path), ["a"])
    assert fake_slurm.calls("squeue") == []


def test_the_commands(tmp_path: Path) -> None:
    asked = commands(["a"], 100.5)
    assert asked["squeue"][:5] == ["squeue", "--me", "--states=all", "--noheader", "--name=a"]
    assert asked["squeue"][-1].count(":") == len(SQUEUE_FIELDS)
    assert {"--duplicates", "--allocations", "--starttime=now-101", "--endtime=now"} <= set(asked["sacct"])
    assert asked["sacct"][-1] == "--format=" + ",".join(SACCT_FIELDS)
    assert not any("--name" in word for word in commands(["k" * 20] * 10_000, 1)["squeue"]), (
        "too long for Linux"
    )
    assert not any("--name" in word for word in commands([], 1)["sacct"])


def test_the_accounting_is_asked_for_the_time_since_the_oldest_key(
    tmp_path: Path, paths: SegmentPaths
) -> None:
    paths.segment.write_text("{}")
    os.utime(paths.segment, (1000, 1000))
    asked: list[Any] = []

    def listen(questions: Any) -> dict[str, str | None]:
        asked.append(questions)
        return {"squeue": "", "sacct": ""}

    Queue(SitePaths(tmp_path), [paths.root.name, "other"], listen, lambda: 5000.0).look_up("other")
    assert f"--starttime=now-{4000 + 86400}" in asked[0]["sacct"]


def test_of_two_jobs_of_one_key_the_one_that_claimed_it(
    tmp_path: Path, paths: SegmentPaths, fake_slurm: FakeSlurm
) -> None:
    key = paths.root.name
    fake_slurm.says("squeue", queued(Name=key, JobID="4") + queued(Name=key, JobID="5", SubmitTime="105"))
    assert Queue(SitePaths(tmp_path), [key]).look_up(key)["job_id"] == "5"
    paths.claim.write_text('{"job": "4"}')
    assert Queue(SitePaths(tmp_path), [key]).look_up(key)["job_id"] == "4"


def test_times_are_asked_for_in_seconds(fake_slurm: FakeSlurm) -> None:
    fake_slurm.does("squeue", "echo $SLURM_TIME_FORMAT")
    assert ask({"squeue": ["squeue"]}) == {"squeue": "%s\n"}


@pytest.mark.parametrize("shell", ["echo x; exit 1", "kill -9 $$"])
def test_a_program_that_fails_has_not_answered(fake_slurm: FakeSlurm, shell: str) -> None:
    fake_slurm.does("sacct", shell)
    assert ask({"squeue": ["squeue"], "sacct": ["sacct"]}) == {"squeue": "", "sacct": None}


def test_a_program_that_is_not_there_has_not_answered() -> None:
    assert ask({"squeue": ["/none/squeue"]}) == {"squeue": None}


def test_programs_that_hang_are_given_up_together(
    fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_queue, "_QUERY_SECONDS", 0.5)
    for name in ("squeue", "sacct"):
        fake_slurm.does(name, "exec sleep 30")
    began = time.monotonic()
    assert ask({"squeue": ["squeue"], "sacct": ["sacct"]}) == {"squeue": None, "sacct": None}
    assert time.monotonic() - began < 5


def test_output_that_cannot_be_read_is_no_answer(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("squeue", "slurm_load_jobs error\n")
    answer = Queue(SitePaths(tmp_path), ["a"]).look_up("a")
    assert answer == {"state": "unknown", "evidence": "no answer from squeue"}


# ---- the segment's files

ENDED = {"state": "ended", "evidence": "sacct: FAILED", "started": 100.0, "ended": 200.0, "outcome": "failed",
         "exit_code": 1, "job_id": "7", "submitted": 90.0}  # fmt: skip
ABSENT = {"state": "absent", "evidence": "squeue and sacct know no such job"}


def exit_record(paths: SegmentPaths, start: float, end: float) -> None:
    paths.exit.write_text(json.dumps({"start": start, "end": end, "outcome": "timeout", "exit_code": 143}))


def test_the_guards_word_on_the_end_is_the_more_exact(paths: SegmentPaths) -> None:
    exit_record(paths, 101.0, 199.0)
    answer = with_files(dict(ENDED), paths, 1000.0, 1000.0)
    assert (answer["outcome"], answer["exit_code"], answer["ended"]) == ("timeout", 143, 200.0)
    assert answer["evidence"] == "sacct: FAILED; exit.json"


@pytest.mark.parametrize(("start", "end"), [(10.0, 20.0), (101.0, 300.0)])
def test_the_guards_word_on_another_incarnation_is_not(paths: SegmentPaths, start: float, end: float) -> None:
    exit_record(paths, start, end)
    assert with_files(dict(ENDED), paths, 1000.0, 1000.0) == ENDED


def test_a_running_job_is_not_ended_by_a_file(paths: SegmentPaths) -> None:
    exit_record(paths, 101.0, 199.0)
    running = {"state": "running", "evidence": "squeue: RUNNING"}
    assert with_files(dict(running), paths, 1000.0, 1000.0) == running


def test_what_slurm_has_forgotten_the_guard_still_knows(paths: SegmentPaths) -> None:
    exit_record(paths, 101.0, 199.0)
    answer = with_files(dict(ABSENT), paths, 1000.0, 1000.0)
    assert (answer["state"], answer["started"], answer["ended"]) == ("ended", 101.0, 199.0)
    assert answer["evidence"] == "exit.json; Slurm no longer knows the job"


def test_a_submitted_key_is_never_absent(paths: SegmentPaths) -> None:
    (paths.root / "job.json").write_text('{"job_id": "7", "submitted": 500.0}')
    after = with_files(dict(ABSENT), paths, taken=400.0, now=501.0)
    assert (after["state"], after["job_id"]) == ("pending", "7"), "Slurm was asked before the submission"
    lost = with_files(dict(ABSENT), paths, taken=9000.0, now=9000.0)
    assert (lost["state"], lost["evidence"]) == ("unknown", "sbatch gave it the number 7")


def test_a_submission_without_an_answer_is_unknown_for_a_while(paths: SegmentPaths) -> None:
    (paths.root / "submitting.0").touch()
    now = time.time()
    assert with_files(dict(ABSENT), paths, now, now)["state"] == "unknown"
    assert with_files(dict(ABSENT), paths, now, now + LAG_SECONDS + 1) == ABSENT


def test_files_that_cannot_be_read_say_nothing(paths: SegmentPaths) -> None:
    paths.exit.write_text("{")
    (paths.root / "job.json").write_text("[1]")
    assert with_files(dict(ABSENT), paths, 1.0, 1.0) == ABSENT
