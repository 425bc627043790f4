"""Submission and cancellation, with stand-ins for Slurm's programs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from clusters import slurm
from clusters.paths import SegmentPaths, SitePaths
from clusters.segment import Segment
from clusters.slurm import Request
from clusters.slurm_queue import LAG_SECONDS, Queue
from tests.clusters.fake_slurm import FakeSlurm
from tests.clusters.test_slurm_records import queued


def submit(
    segment: Segment, request: Request | None = None, python: str = "/site/python"
) -> dict[str, object]:
    site = SitePaths(Path(segment.scratch))
    site.segment(segment.key).root.mkdir(parents=True, exist_ok=True)
    request = request or Request()
    queue = Queue(site, [segment.key, *request.after])
    return slurm.submit(segment, site.segment(segment.key), python, request, queue)


def test_the_batch_script(segment: Segment, paths: SegmentPaths, fake_slurm: FakeSlurm) -> None:
    segment = dataclasses.replace(segment, time_limit_seconds=3601.0, drain_seconds=119.5)
    request = Request(
        nodes=2, gpus_per_node=4, cpus_per_node=32, memory_per_node="480G", account="proj", partition="boost",
        qos="brief", reservation="day", constraint="a100", exclude=("cn3", "cn4"), exclusive=True,
        comment="eurotrain", setup=("module load gcc",),
    )  # fmt: skip
    answer = submit(segment, request)
    assert (answer["state"], answer["job_id"]) == ("pending", "42")
    flags = {line.removeprefix("#SBATCH --") for line in fake_slurm.script if line.startswith("#SBATCH")}
    assert flags == {
        f"job-name={segment.key}", "time=61", "nodes=2", "ntasks-per-node=1", "cpus-per-task=32",
        "gpus-per-node=4", "mem=480G", "account=proj", "partition=boost", "qos=brief", "reservation=day",
        "constraint=a100", "exclude=cn3,cn4", "exclusive", "comment=eurotrain", "no-requeue", "no-kill",
        "signal=B:USR1@120", f"chdir={paths.root}", "open-mode=append",
        f"output={paths.logs}/submitit/%j_0_log.out",
    }  # fmt: skip
    assert "module load gcc" in fake_slurm.script
    assert f"watched /site/python -u -m submitit.core._submit {paths.logs}/submitit" in fake_slurm.script
    assert (paths.logs / "submitit" / "42_submitted.pkl").exists()


def test_what_is_not_asked_for_is_left_to_the_site(segment: Segment, fake_slurm: FakeSlurm) -> None:
    submit(segment)
    flags = [line.split("=")[0] for line in fake_slurm.script if line.startswith("#SBATCH")]
    for absent in ("account", "partition", "qos", "gres", "mem", "wckey", "dependency", "requeue", "error"):
        assert f"#SBATCH --{absent}" not in flags


def test_the_job_runs_the_guard_with_the_time_a_drain_takes(segment: Segment, paths: SegmentPaths) -> None:
    command = slurm.job_command(dataclasses.replace(segment, drain_seconds=90.0), paths, "py")
    assert command[:6] == ["py", "-P", "-m", "clusters.guard", "--time-limit=60.0", "--grace=90.0"]
    assert command[6:] == [
        str(paths.root),
        "--",
        "py",
        "-P",
        "-m",
        "orchestrator.supervisor",
        "--slurm",
        str(paths.root),
    ]


def test_submitting_twice_calls_sbatch_once(segment: Segment, fake_slurm: FakeSlurm) -> None:
    assert submit(segment)["job_id"] == "42"
    again = submit(segment)  # Slurm does not know it yet
    assert (again["state"], again["job_id"]) == ("unknown", "42")
    fake_slurm.says("squeue", queued(Name=segment.key, JobID="42"))
    assert submit(segment)["state"] == "running"
    assert len(fake_slurm.calls("sbatch")) == 1


def test_a_job_of_this_name_is_found_though_nobody_wrote_down_its_number(
    segment: Segment, fake_slurm: FakeSlurm
) -> None:
    fake_slurm.says("squeue", queued(Name=segment.key, JobID="99", State="PENDING"))
    answer = submit(segment)
    assert (answer["state"], answer["job_id"]) == ("pending", "99")
    assert fake_slurm.calls("sbatch") == []


@pytest.mark.parametrize("silent", ["squeue", "sacct"])
def test_nothing_is_submitted_while_slurm_does_not_answer(
    segment: Segment, fake_slurm: FakeSlurm, silent: str
) -> None:
    fake_slurm.does(silent, "exit 1")
    assert submit(segment)["state"] == "unknown"
    assert fake_slurm.calls("sbatch") == []


def test_a_refusal_is_told_in_slurms_words_and_may_be_tried_again(
    segment: Segment, paths: SegmentPaths, fake_slurm: FakeSlurm
) -> None:
    why = "Batch job submission failed: Invalid account or account/partition combination specified"
    fake_slurm.does("sbatch", f"echo 'sbatch: error: {why}' >&2; exit 1")
    with pytest.raises(ValueError, match="^" + why):
        submit(segment)
    fake_slurm.says("sbatch", "Submitted batch job 43\n")
    assert submit(segment)["job_id"] == "43"


def test_a_full_queue_is_no_refusal(segment: Segment, paths: SegmentPaths, fake_slurm: FakeSlurm) -> None:
    """Both lines as Slurm 22.05 prints them; the second one alone would say nothing."""
    why = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    told = f"sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: {why}\n"
    (paths.root / "why").parent.mkdir(parents=True, exist_ok=True)
    (paths.root / "why").write_text(told)
    fake_slurm.does("sbatch", f"cat {paths.root}/why >&2; exit 1")
    answer = submit(segment)
    assert answer["state"] == "absent"
    assert answer["held"] == (
        f"Slurm takes no more jobs now: QOSMaxSubmitJobPerUserLimit Batch job submission failed: {why}"
    )
    fake_slurm.says("sbatch", "Submitted batch job 43\n")
    assert submit(segment)["job_id"] == "43"


def test_a_job_may_begin_later(segment: Segment, fake_slurm: FakeSlurm) -> None:
    submit(segment, Request(begin=time.time() + 600.5))
    (line,) = [line for line in fake_slurm.script if line.startswith("#SBATCH --begin=")]
    assert 500 < int(line.partition("=now+")[2]) <= 601


def test_a_beginning_that_has_passed_is_not_told(segment: Segment, fake_slurm: FakeSlurm) -> None:
    submit(segment, Request(begin=time.time() - 1))
    assert not [line for line in fake_slurm.script if "--begin" in line]


@pytest.mark.parametrize(
    "shell",
    [
        "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1",
        "echo 'sbatch: error: Zero Bytes were transmitted or received' >&2; exit 1",
        "echo 'Welcome to the site'",
    ],
)
def test_where_sbatch_cannot_tell_nothing_is_submitted_for_a_while(
    segment: Segment, paths: SegmentPaths, fake_slurm: FakeSlurm, shell: str
) -> None:
    fake_slurm.does("sbatch", shell)
    answer = submit(segment)
    assert answer["state"] == "unknown"
    assert str(answer["evidence"]).startswith("sbatch: ")
    fake_slurm.says("sbatch", "Submitted batch job 43\n")
    assert submit(segment)["state"] == "unknown"
    assert len(fake_slurm.calls("sbatch")) == 1
    age(paths.root / "submitting.0")
    assert submit(segment)["job_id"] == "43"


def age(mark: Path) -> None:
    past = time.time() - LAG_SECONDS - 1
    os.utime(mark, (past, past))


def test_of_those_who_find_an_old_mark_one_goes_on(paths: SegmentPaths) -> None:
    now = time.time()
    assert slurm.begin(paths, now) == paths.root / "submitting.0"
    assert slurm.begin(paths, now) is None
    age(paths.root / "submitting.0")
    assert slurm.begin(paths, now) == paths.root / "submitting.1"
    assert slurm.begin(paths, now) is None


def test_another_agent_was_quicker(segment: Segment, paths: SegmentPaths, fake_slurm: FakeSlurm) -> None:
    site = SitePaths(Path(segment.scratch))
    queue = Queue(site, [segment.key])
    assert queue.look_up(segment.key)["state"] == "absent"
    assert submit(segment)["job_id"] == "42"
    age(paths.root / "submitting.0")
    (paths.root / "job.json").rename(paths.root / "job.hidden")
    assert queue.look_up(segment.key)["state"] == "absent", "what this agent saw is old"
    (paths.root / "job.hidden").rename(paths.root / "job.json")
    assert slurm.submit(segment, paths, "py", Request(), queue)["state"] != "absent"
    assert len(fake_slurm.calls("sbatch")) == 1


def test_without_slurm_there_is_one_line(
    segment: Segment, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake_slurm.folder / "srun").unlink()
    for name in ("squeue", "sacct"):
        fake_slurm.does(name, ":")
    monkeypatch.setenv("PATH", str(fake_slurm.folder))
    with pytest.raises(ValueError, match='Could not detect "srun"'):
        submit(segment)


# ---- chains


def test_a_chain_is_submitted_ahead(segment: Segment, fake_slurm: FakeSlurm) -> None:
    second = dataclasses.replace(segment, key="run.here.0001", sequence=1)
    submit(segment)
    fake_slurm.says("squeue", queued(Name=segment.key, JobID="42"))
    fake_slurm.says("sbatch", "Submitted batch job 43\n")
    assert submit(second, Request(after=(segment.key,)))["job_id"] == "43"
    assert "#SBATCH --dependency=afterany:42" in fake_slurm.script


def test_nobody_waits_for_what_has_ended(segment: Segment, fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("squeue", queued(Name="before", JobID="41", State="COMPLETED", EndTime="120"))
    submit(segment, Request(after=("before",)))
    assert not any("dependency" in line for line in fake_slurm.script)


def test_one_cannot_wait_for_a_key_that_has_no_job(segment: Segment, fake_slurm: FakeSlurm) -> None:
    with pytest.raises(ValueError, match="cannot wait for before: squeue and sacct know no such job"):
        submit(segment, Request(after=("before",)))
    assert fake_slurm.calls("sbatch") == []


def test_a_request_with_a_field_that_there_is_not() -> None:
    with pytest.raises(
        ValueError, match="unknown field 'node' of a Slurm request; known: nodes, gpus_per_node"
    ):
        Request.from_json({"node": 2})


# ---- the batch script's shell


def run_watched(folder: Path, body: str) -> subprocess.Popen[str]:
    script = folder / "batch.sh"
    script.write_text("\n".join(["#!/bin/bash", "set -e", *slurm._SETUP, f"watched sh -c '{body}'"]))
    return subprocess.Popen(["bash", str(script)], start_new_session=True, text=True, stdout=subprocess.PIPE)


def test_the_shell_has_the_exit_code_of_what_it_watches(tmp_path: Path) -> None:
    assert run_watched(tmp_path, "exit 7").wait(10) == 7
    assert run_watched(tmp_path, "kill -9 $$").wait(10) == 128 + 9


def test_the_warning_before_the_limit_reaches_the_group_as_term(tmp_path: Path) -> None:
    body = 'trap "echo told; exit 5" TERM; echo ready; while true; do sleep 0.05; done'
    process = run_watched(tmp_path, body)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(10)
    assert process.stdout.readline() == "told\n"
    assert process.wait(10) == 5


def test_a_cancellation_does_not_end_the_shell_before_what_it_watches(tmp_path: Path) -> None:
    body = 'trap "sleep 0.5; echo told; exit 6" TERM; echo ready; while true; do sleep 0.05; done'
    process = run_watched(tmp_path, body)
    assert process.stdout
    process.stdout.readline()
    os.killpg(process.pid, 15)  # as Slurm does: everybody at once
    assert process.stdout.readline() == "told\n"
    assert process.wait(10) == 6


def test_a_job_finds_its_pickle_though_nobody_named_it(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "7_0_result.pkl").write_text("an earlier job's")
    (tmp_path / "a folder" / f"{uuid.uuid4().hex}.pkl").write_text("it")
    line = slurm._FIND_PICKLE.format(folder=f"'{tmp_path}/a folder'")
    for _ in range(2):  # a second time it is there already
        subprocess.run(["bash", "-c", line], env={**os.environ, "SLURM_JOB_ID": "8"}, check=False)
    assert (tmp_path / "a folder" / "8_submitted.pkl").read_text() == "it"


# ---- cancellation


def test_cancelling_ends_what_waits_or_runs(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    rows = [("a", "1", "RUNNING"), ("b", "2", "PENDING"), ("c", "3", "COMPLETED")]
    fake_slurm.says("squeue", "".join(queued(Name=n, JobID=j, State=s) for n, j, s in rows))
    queue = Queue(SitePaths(tmp_path), ["a", "b", "c", "d"])
    assert slurm.cancel(["a", "b", "c", "d"], queue) == ["1", "2"]
    assert [call.split()[1:] for call in fake_slurm.calls("scancel")] == [["1", "2"]]


def test_nothing_to_cancel(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    assert slurm.cancel(["a"], Queue(SitePaths(tmp_path), ["a"])) == []
    assert fake_slurm.calls("scancel") == []


def test_a_cancellation_that_slurm_refuses(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("squeue", queued(Name="a"))
    fake_slurm.does("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(ValueError, match="scancel: scancel: error: Access/permission denied"):
        slurm.cancel(["a"], Queue(SitePaths(tmp_path), ["a"]))


def test_waiting_jobs_are_kept_away_from_nodes_and_keep_their_numbers(
    tmp_path: Path, fake_slurm: FakeSlurm
) -> None:
    rows = [("a", "1", "RUNNING"), ("b", "2", "PENDING"), ("c", "3", "COMPLETED"), ("d", "4", "PENDING")]
    fake_slurm.says("squeue", "".join(queued(Name=n, JobID=j, State=s) for n, j, s in rows))
    keys = ["a", "b", "c", "d", "e"]
    assert slurm.exclude(keys, ["cn3", "cn4"], Queue(SitePaths(tmp_path), keys)) == ["2", "4"]
    assert slurm.exclude(["b"], [], Queue(SitePaths(tmp_path), ["b"])) == ["2"]
    assert [call.split()[1:] for call in fake_slurm.calls("scontrol")] == [
        ["update", "JobId=2", "ExcNodeList=cn3,cn4"],
        ["update", "JobId=4", "ExcNodeList=cn3,cn4"],
        ["update", "JobId=2", "ExcNodeList="],
    ]
    assert fake_slurm.calls("scancel") == fake_slurm.calls("sbatch") == []


def test_an_exclusion_that_slurm_refuses(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("squeue", queued(Name="a", State="PENDING"))
    fake_slurm.does("scontrol", "echo 'slurm_update error: Invalid node name specified' >&2; exit 1")
    with pytest.raises(ValueError, match="scontrol: slurm_update error: Invalid node name specified"):
        slurm.exclude(["a"], ["nowhere"], Queue(SitePaths(tmp_path), ["a"]))


def test_a_job_record_is_what_the_agent_wrote(
    segment: Segment, paths: SegmentPaths, fake_slurm: FakeSlurm
) -> None:
    submit(segment)
    assert json.loads((paths.root / "job.json").read_text())["job_id"] == "42"
