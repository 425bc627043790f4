"""Real Slurm sites, reached by real SSH: one job per key whatever breaks, one execution per exchange."""

from __future__ import annotations

import functools
import itertools
import json
import signal
import time

import pytest

from clusters.connection import Unreachable
from clusters.slurm_queue import commands
from tests.clusters.site_on_bed import SCRATCH, SiteOnBed

pytestmark = pytest.mark.slurm


def test_a_segment_from_submission_to_its_end(site: SiteOnBed) -> None:
    answer = site.submit("whole", 3, request={"gpus_per_node": 2})
    assert (answer["ok"], answer["state"]) == (True, "pending")
    running = site.wait("whole", "running")
    assert running["nodes"] in ("cn1", "cn2")
    job = site.wait("whole", "ended")
    assert (job["outcome"], job["exit_code"], job["job_id"]) == ("completed", 0, answer["job_id"])
    assert 3 <= job["elapsed"] <= 15
    assert job["usage"]["gres/gpu"] == 2 * job["elapsed"]
    assert "exit.json" in job["evidence"]
    assert site.facts("whole")["gpus"] in ("0,1", "2,3")


def test_submitted_twice_it_is_one_job(site: SiteOnBed) -> None:
    operation = site.operation("twice", 2)
    first, second = site.connection.exchange([operation, operation])
    third = site.submit("twice", 2)
    assert first["ok"] and second["ok"] and third["ok"]  # noqa: PT018
    assert {first["job_id"], third["job_id"]} == {first["job_id"]}
    assert site.jobs_named("twice") == [first["job_id"]]
    site.wait("twice", "ended")
    assert site.read("twice", "starts").split() == [first["job_id"]]


def test_an_agent_killed_before_its_answer(site: SiteOnBed) -> None:
    """sbatch has been called, nobody was told: the job is found by its key, and runs, once."""
    wrapper = '#!/bin/sh\n/usr/bin/sbatch "$@"\nkill -9 $PPID\n'
    site.shell("mkdir -p bin; cat > bin/sbatch; chmod +x bin/sbatch; echo 'PATH=$HOME/bin:$PATH' > .bashrc",
               input=wrapper, stdin=None)  # fmt: skip
    try:
        with pytest.raises(Unreachable, match="as when the command there is killed"):
            site.submit("lost", 2)
    finally:
        site.shell("rm -r bin .bashrc")
    again = site.submit("lost", 2)
    assert again["state"] in ("pending", "running")
    (number,) = site.jobs_named("lost")
    assert again["job_id"] == number
    assert site.wait("lost", "ended")["outcome"] == "completed"
    assert site.read("lost", "starts").split() == [number]


def test_two_jobs_of_one_key_run_it_once(site: SiteOnBed) -> None:
    """Should Slurm ever have two, the second claimant leaves at once."""
    answer = site.submit("double", 4)
    number, folder = answer["job_id"], f"{SCRATCH}/segments/double/logs/submitit"
    pickle = f"cp {number}_submitted.pkl {'0' * 32}.pkl"  # as a second submission would have left it
    site.shell(f"cd {folder}; {pickle}; sbatch {number}_submission.sh")
    deadline = time.monotonic() + 60
    while site.shell(f"cat {SCRATCH}/segments/double/starts || true").count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    owner = json.loads(site.read("double", "claim.json"))["job"]
    job = site.wait("double", "ended")
    assert (job["job_id"], job["outcome"]) == (owner, "completed")
    assert len(site.jobs_named("double")) == 2


def test_a_key_that_nobody_submitted_is_absent(site: SiteOnBed) -> None:
    assert site.job("never")["state"] == "absent"


def test_another_users_job_of_the_same_name_is_not_ours(site: SiteOnBed) -> None:
    site.shell("sbatch -A proj -J shared-name --wrap 'sleep 20'", user="bob")
    assert site.jobs_named("shared-name", "bob")
    assert site.job("shared-name")["state"] == "absent"
    answer = site.submit("shared-name")
    assert answer["ok"]
    assert answer["job_id"] not in site.jobs_named("shared-name", "bob")
    site.shell("scancel -u bob", user="bob")
    site.wait("shared-name", "ended")


def test_what_slurm_refuses_is_one_line(site: SiteOnBed) -> None:
    answer = site.submit("refused", request={"account": "nobody"})
    assert not answer["ok"]
    assert answer["error"].startswith("submit: Batch job submission failed: Invalid account")
    assert "\n" not in answer["error"]


def test_a_job_without_budget_waits_and_says_why(site: SiteOnBed) -> None:
    site.submit("poor", request={"account": "small", "gpus_per_node": 4})
    deadline = time.monotonic() + 20
    while "Assoc" not in (job := site.job("poor")).get("reason", ""):
        assert time.monotonic() < deadline, job
        time.sleep(0.5)
    assert (job["state"], job["reason"]) == ("pending", "AssocGrpGRESMinutes")
    (told,) = site.connection.exchange([{"op": "cancel", "scheduler": "slurm", "keys": ["poor"]}])
    assert told["cancelled"] == [job["job_id"]]
    job = site.wait("poor", "ended")
    assert (job["outcome"], job["elapsed"], job["started"]) == ("cancelled", 0.0, 0.0)


def test_a_chain_submitted_ahead_runs_in_order(site: SiteOnBed) -> None:
    keys = ["chain-0", "chain-1", "chain-2"]
    operations = [site.operation(key, 1, after=keys[max(0, n - 1) : n]) for n, key in enumerate(keys)]
    before = site.executions
    assert [r["state"] for r in site.connection.exchange(operations)] == ["pending"] * 3
    assert site.executions - before == 1
    last = site.wait("chain-2", "ended", 90)
    times = [site.job(key) for key in keys]
    assert all(a["ended"] <= b["started"] for a, b in itertools.pairwise(times))
    assert last["outcome"] == "completed"


def test_a_cancelled_link_of_a_chain_is_still_known_to_the_accounting(site: SiteOnBed) -> None:
    """It was never eligible: sacct hides such a job unless every state is asked for."""
    site.connection.exchange([site.operation("first", 30), site.operation("second", 1, after=["first"])])
    site.connection.exchange([{"op": "cancel", "scheduler": "slurm", "keys": ["second", "first"]}])
    site.wait("second", "ended")
    command = " ".join(f"'{word}'" for word in commands(["second"], 3600)["sacct"])
    deadline = time.monotonic() + 20
    while "CANCELLED" not in site.shell(f"SLURM_TIME_FORMAT=%s {command}"):
        assert time.monotonic() < deadline
        time.sleep(0.5)


# ---- limits and signals


def test_the_signal_before_the_limit_drains(site: SiteOnBed) -> None:
    site.submit("limited", 300, time_limit_seconds=60.0, drain_seconds=40.0)
    job = site.wait("limited", "ended", 90)
    facts = site.facts("limited")
    assert facts["drained"]
    assert facts["time"] - job["started"] <= 50, "Slurm may signal earlier than asked, never later"
    assert (job["exit_code"], job["slurm_state"]) == (0, "COMPLETED")


def test_a_cancelled_job_drains_as_long_as_slurm_lets_it(site: SiteOnBed) -> None:
    site.submit("cancelled", 300)
    site.wait("cancelled", "running")
    deadline = time.monotonic() + 30
    while site.job("cancelled")["heartbeat_age"] is None:
        assert time.monotonic() < deadline
    site.connection.exchange([{"op": "cancel", "scheduler": "slurm", "keys": ["cancelled"]}])
    job = site.wait("cancelled", "ended")
    assert (job["outcome"], job["slurm_state"]) == ("cancelled", "CANCELLED")
    assert site.facts("cancelled")["drained"]
    assert json.loads(site.read("cancelled", "exit.json"))["exit_code"] == 0


# ---- a site that is not well


def test_with_the_accounting_dead_nothing_is_absent_and_nothing_submitted(site: SiteOnBed) -> None:
    site.submit("alive", 25)
    site.wait("alive", "running")
    site.bed.signal("south", "login", "slurmdbd")
    try:
        assert site.job("alive")["state"] == "running"
        assert site.job("none") | {"heartbeat_age": 0} == {
            "state": "unknown", "evidence": "no answer from sacct", "heartbeat_age": 0,
        }  # fmt: skip
        assert site.submit("new")["state"] == "unknown"
        assert site.jobs_named("new") == []
    finally:
        site.bed.start("south", "login", "slurmdbd")
    deadline = time.monotonic() + 30
    while (answer := site.submit("new"))["state"] == "unknown":
        assert time.monotonic() < deadline, answer
    assert site.wait("new", "ended")["outcome"] == "completed"
    assert site.wait("alive", "ended", 90)["outcome"] == "completed"


def test_with_the_controller_dead_everything_is_unknown(site: SiteOnBed) -> None:
    time.sleep(3)  # what has just ended is booked, and what slurmctld knows is on its disk
    site.bed.signal("south", "login", "slurmctld", signal.SIGTERM)
    try:
        time.sleep(1)
        assert site.submit("later")["state"] == "unknown"
        assert site.job("later")["evidence"] == "no answer from squeue"
        assert site.job("whole")["state"] == "ended", "the accounting knows its end"
    finally:
        site.bed.start("south", "login", "slurmctld")
    deadline = time.monotonic() + 30
    while (answer := site.submit("later"))["state"] == "unknown":
        assert time.monotonic() < deadline, answer
        time.sleep(0.5)
    assert site.wait("later", "ended", 60)["outcome"] == "completed"


def test_an_allocation_that_loses_a_node_goes_on_and_is_counted_whole(site: SiteOnBed) -> None:
    site.submit("shrinks", 45, request={"nodes": 2, "gpus_per_node": 4})
    job = site.wait("shrinks", "running")
    # The batch step is on the first node; the second one dies.
    site.bed.cut_power("south", "cn2")
    try:
        job = site.wait("shrinks", "ended", 120)
    finally:
        site.bed.restore_power("south", "cn2")
    assert job["outcome"] == "completed"
    assert 4 * job["elapsed"] < job["usage"]["gres/gpu"] < 8 * job["elapsed"]
    assert "others" not in job


# ---- what a chain asks of its site


def test_a_waiting_job_is_kept_away_from_a_node_and_let_back(site: SiteOnBed) -> None:
    site.submit("ahead", 20)
    number = site.submit("behind", 1, after=["ahead"])["job_id"]

    def excluded() -> str:
        (word,) = [w for w in site.shell(f"scontrol show job -o {number}").split() if w.startswith("ExcNode")]
        return word.partition("=")[2]

    def ask(*nodes: str) -> dict[str, object]:
        operation = {
            "op": "exclude",
            "scheduler": "slurm",
            "keys": ["behind", "nobody"],
            "nodes": list(nodes),
        }
        (result,) = site.connection.exchange([operation])
        return result

    assert ask("cn1") == {"ok": True, "excluded": [number]}
    assert excluded() == "cn1"
    assert ask() == {"ok": True, "excluded": [number]}
    assert excluded() == "(null)"
    assert "Invalid node name" in str(ask("elsewhere")["error"])
    site.shell(f"scancel {site.job('ahead')['job_id']} {number}")


def test_the_site_tells_what_it_allows(site: SiteOnBed) -> None:
    operation = {"op": "limits", "account": "proj", "partition": "", "qos": "", "keys": []}
    now = int(time.time())
    root = functools.partial(site.bed.root, site.name, "login")
    root("scontrol", "create", "reservation", "ReservationName=repair", f"StartTime=now+{3600}",
         "Duration=60", "Users=root", "Flags=MAINT", "Nodes=ALL")  # fmt: skip
    root("sacctmgr", "-i", "modify", "qos", "brief", "set", "MaxSubmitJobsPerUser=0")
    try:
        (told,) = site.connection.exchange([operation])
        (brief,) = site.connection.exchange([{**operation, "qos": "brief"}])
        held = site.submit("held", 1, request={"qos": "brief"})
    finally:
        root("scontrol", "delete", "ReservationName=repair")
        root("sacctmgr", "-i", "modify", "qos", "brief", "set", "MaxSubmitJobsPerUser=3")
    limits = told["limits"]
    assert limits["times"][0][0] == 7200.0
    (window,) = limits["windows"]
    assert window["name"] == "repair"
    assert 3590 <= window["start"] - now <= 3700
    assert window["end"] - window["start"] == 3600
    assert [0, "QOS brief (MaxSubmitPU)"] in [[most, who] for most, _, who in brief["limits"]["jobs"]]
    assert held["state"] == "absent"
    assert "QOSMaxSubmitJobPerUserLimit" in held["held"]
