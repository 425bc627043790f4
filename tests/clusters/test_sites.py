"""Real Slurm sites, reached by real SSH: one job per key whatever breaks, one execution per exchange."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clusters.connection import Unreachable
from clusters.segment import Checkpointing, Data, ModelShape, Segment, Training
from clusters.slurm_queue import commands
from tests.clusters.site_on_bed import SCRATCH, SiteOnBed, connect
from tests.testbed.bed import Testbed

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def site(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteOnBed]:
    pattern = Segment(
        key="", run="run", site="south", island=0, islands=1, sequence=0, scratch=SCRATCH, layout={"tp": 1},
        model=ModelShape(1, 64, 128, 4, 2, 512), training=Training(1, 32, 4, 2, 1e-3), data=Data(("data/x",)),
        checkpointing=Checkpointing(5), time_limit_seconds=300.0, units_per_hour=1.0, unit_cap=1.0,
        drain_seconds=20.0,
    )  # fmt: skip
    connection = connect(testbed, "south", tmp_path_factory.mktemp("home"))
    site = SiteOnBed(testbed, "south", connection, pattern)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        patch.setenv("XDG_RUNTIME_DIR", sockets)  # the sites of any two test beds have the same addresses
        site.prepare()
        connection.exchange([])
        yield site
        connection.session.close()


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
    job = site.wait("double", "running")
    assert job["job_id"] == answer["job_id"]
    site.wait("double", "ended")
    assert len(site.read("double", "starts").split()) == 2
    assert json.loads(site.read("double", "claim.json"))["job_id"] == answer["job_id"]
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
    assert 10 <= facts["time"] - job["started"] <= 50
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


# ---- the connection


def test_an_exchange_is_one_execution_of_ssh(site: SiteOnBed) -> None:
    site.connection.exchange([])
    before, connections = site.executions, site.connections
    for number in range(5):
        keys = ["whole", "twice", f"none-{number}"]
        look = {"op": "jobs", "scheduler": "slurm", "keys": keys}
        site.connection.exchange([look, {"op": "events", "since": {key: {} for key in keys}}, look])
    assert site.executions - before == 5
    assert site.connections == connections


def test_a_poll_takes_little_longer_than_squeue_by_hand(
    site: SiteOnBed, record_property: Callable[[str, object], None]
) -> None:
    session = site.connection.session
    bare = ["ssh", *session.options(), "-T", "south", "squeue --me"]
    look = [{"op": "jobs", "scheduler": "slurm", "keys": ["whole", "twice"]}]
    took: dict[str, list[float]] = {"bare ssh squeue": [], "poll": []}
    for _ in range(9):
        began = time.monotonic()
        subprocess.run(bare, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        middle = time.monotonic()
        site.connection.exchange(look)
        took["bare ssh squeue"].append(middle - began)
        took["poll"].append(time.monotonic() - middle)
    for name, seconds in took.items():
        record_property(
            name, f"median {statistics.median(seconds):.3f} s, {min(seconds):.3f}-{max(seconds):.3f}"
        )
    assert statistics.median(took["poll"]) < statistics.median(took["bare ssh squeue"]) + 1.0


def test_a_session_whose_owner_was_killed(site: SiteOnBed) -> None:
    site.connection.exchange([])
    os.kill(site.session_pid, signal.SIGKILL)
    path = site.connection.session.control_path()
    deadline = time.monotonic() + 10
    while site.connection.session.is_live():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert path.is_socket(), "left behind"
    assert site.connection.exchange([]) == []
    assert site.connection.session.is_live()


def test_an_expired_session_is_told_and_not_knocked_at(site: SiteOnBed) -> None:
    keys = site.bed.directory / "south" / "ssh" / "authorized_keys"
    allowed = keys.read_text()
    site.connection.session.close()
    wait_until_dead(site)
    keys.write_text("")
    try:
        for _ in range(4):
            with pytest.raises(
                Unreachable, match=r"south: .*Permission denied \(publickey\)\.; type `ssh .* south`"
            ):
                site.connection.exchange([])
        before = site.connections
        with pytest.raises(Unreachable, match="Permission denied"):
            site.connection.exchange([])
        assert site.connections == before, "nobody knocks again"
    finally:
        keys.write_text(allowed)
    with pytest.raises(Unreachable, match="Permission denied"):
        site.connection.exchange([])
    remedy = site.connection.session.remedy().removeprefix("type `").removesuffix("`")
    subprocess.run(
        remedy.split(), check=True, timeout=30, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert site.connection.exchange([]) == []
    assert site.connection.session.budget.read().refused == ""


def wait_until_dead(site: SiteOnBed) -> None:
    deadline = time.monotonic() + 10
    while site.connection.session.is_live():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_site_behind_a_cut_link_is_given_up_in_time(site: SiteOnBed) -> None:
    site.connection.exchange([])
    with site.bed.partition("south"):
        began = time.monotonic()
        with pytest.raises(Unreachable, match="south: no answer within 2 s"):
            site.connection.exchange([], timeout=2.0)
        assert time.monotonic() - began < 4
    assert site.connection.exchange([], timeout=30.0) == [], "the session has survived"


def test_a_shell_that_greets_does_no_harm(site: SiteOnBed) -> None:
    site.shell("printf 'echo Welcome to south\\necho Maintenance on Monday >&2\\n' > .bashrc")
    try:
        assert site.job("never")["state"] == "absent"
    finally:
        site.shell("rm .bashrc")


# ---- files


@pytest.fixture
def slow(site: SiteOnBed) -> Iterator[None]:
    site.connection.exchange([])
    site.bed.wan({"rate_mbit": 40.0, "delay_ms": 5.0, "queue_ms": 2000.0})
    yield
    site.bed.wan()


@pytest.mark.usefixtures("slow")
def test_a_broken_push_is_gone_on_with(site: SiteOnBed, tmp_path: Path) -> None:
    content = os.urandom(12 << 20)
    (tmp_path / "up load").write_bytes(content)
    incoming = site.bed.directory / "south/scratch/eurotrain/incoming"
    with break_session_when_grown(site, incoming), pytest.raises(Unreachable):
        site.connection.push(tmp_path / "up load", "in/box/up load")
    left = int(site.shell(f"stat -c %s {SCRATCH}/incoming/*.part"))
    assert 0 < left < len(content)
    began = received(site)
    assert site.connection.push(tmp_path / "up load", "in/box/up load") == len(content)
    assert received(site) - began < len(content), "what was there was not sent again"
    assert left > 2 << 20, "more than what the headers and a packet sent twice add"
    told = site.shell(f"sha256sum < '{SCRATCH}/in/box/up load'; ls -A {SCRATCH}/incoming '{SCRATCH}/in/box'")
    assert told.split()[0] == subprocess.run(
        ["sha256sum", tmp_path / "up load"], capture_output=True, text=True, check=True
    ).stdout.split()[0].lstrip("\\")
    assert told.count("up load") == 1
    assert ".part" not in told


@pytest.mark.usefixtures("slow")
def test_a_broken_fetch_is_gone_on_with(site: SiteOnBed, tmp_path: Path) -> None:
    site.shell(f"head -c 12M /dev/urandom > '{SCRATCH}/do[w]n \"load'")
    with break_session_when_grown(site, tmp_path / "down"), pytest.raises(Unreachable):
        site.connection.fetch('do[w]n "load', tmp_path / "down" / "file")
    (part,) = (tmp_path / "down").iterdir()
    left = part.stat().st_size
    assert 0 < left < 12 << 20
    inode = part.stat().st_ino
    assert site.connection.fetch('do[w]n "load', tmp_path / "down" / "file") == 12 << 20
    assert (tmp_path / "down" / "file").stat().st_ino == inode
    assert [p.name for p in (tmp_path / "down").iterdir()] == ["file"]
    site.shell(f"rm '{SCRATCH}/do[w]n \"load'")


@contextlib.contextmanager
def break_session_when_grown(site: SiteOnBed, folder: Path) -> Iterator[None]:
    """Kill the shared session in the middle of a transfer; afterwards wait until there may be another."""
    pid, done = site.session_pid, threading.Event()

    def kill() -> None:
        while not done.wait(0.02):
            if any(part.stat().st_size > 3 << 20 for part in folder.glob("*") if part.name.endswith(".part")):
                os.kill(pid, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    done.set()
    killer.join()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not site.connection.session.is_live():
        with contextlib.suppress(Unreachable):  # the pause after a failure
            site.connection.exchange([])
        time.sleep(0.2)


def received(site: SiteOnBed) -> int:
    """Bytes that the site has received over the WAN."""
    return int(site.bed.root("south", "login", "cat", "/proc/net/dev").stdout.split("wan0:")[1].split()[0])


def test_a_push_that_arrives_damaged_is_not_taken(site: SiteOnBed, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(content)
    name = subprocess.run(
        ["sha256sum", tmp_path / "file"], capture_output=True, text=True, check=True
    ).stdout[:64]
    site.shell(f"mkdir -p {SCRATCH}/incoming; head -c 1000 /dev/zero > {SCRATCH}/incoming/{name}.part")
    with pytest.raises(Unreachable, match="south: receive: file has arrived damaged"):
        site.connection.push(tmp_path / "file", "file")
    assert site.shell(f"ls {SCRATCH}/file", check=False) == ""
    assert site.connection.push(tmp_path / "file", "file") == 1 << 20
