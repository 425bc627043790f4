"""A segment on two nodes of a real Slurm site: formed, kept for its user, and gone without a trace."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import events
from tests.orchestrator.segments_on_bed import SegmentOnBed, SegmentsOnBed, segments_on
from tests.testbed.bed import Testbed
from tests.testbed.spec import USERS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

# What somebody else on the machine may try, with a token of their own or none: to join, and to drive.
_JOIN = "timeout 40 {python} -m ray.scripts.scripts start --address={head} --num-cpus=1 --temp-dir=/tmp/bobs"
_DRIVE = (
    '{python} -c \'import ray; ray.init("{head}", _node_ip_address="{here}", log_to_driver=False);'
    'print("DRIVES", len(ray.nodes()))\''
)


@pytest.fixture(scope="module")
def sites(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SegmentsOnBed]]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        patch.setenv("XDG_RUNTIME_DIR", sockets)
        home = tmp_path_factory.mktemp("home")
        found = {name: segments_on(testbed, name, home) for name in ("north", "south")}
        yield found
        for site in found.values():
            site.connection.session.close()


@pytest.fixture(scope="module")
def limited(sites: dict[str, SegmentsOnBed]) -> SegmentOnBed:
    """On the other site, beside all that happens here: a minute, of which the last 15 s are for saving."""
    return sites["south"].start("limited-on-nodes", time_limit_seconds=60.0, drain_seconds=15.0)


@pytest.fixture
def north(sites: dict[str, SegmentsOnBed], limited: SegmentOnBed) -> SegmentsOnBed:
    return sites["north"]


def test_ranks_on_two_nodes(north: SegmentsOnBed) -> None:
    segment = north.start("two")
    started = segment.started()
    assert started["hosts"] == ["cn1", "cn2"]
    assert segment.events(events.NODE_LOST) == []
    for rank in range(2):
        told = segment.environment(1, rank)
        assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == (str(rank), "0", "2")
        assert told["SLURMD_NODENAME"] == f"cn{rank + 1}"
        assert told["MASTER_ADDR"] == north.spec.node_address("cn1")
        assert (told["GLOO_SOCKET_IFNAME"], told["NCCL_SOCKET_IFNAME"]) == ("eth0", "=eth0")
        assert told["CUDA_VISIBLE_DEVICES"] == "0,1", "all that the job has on this node"
        assert not [name for name in told if name.startswith("RAY_")]
    others_are_refused(north)
    north.on("cn2", "kill", "-9", str(started["pids"][1]))
    again = segment.started(2)
    assert again["hosts"] == started["hosts"]
    (died,) = segment.events(events.RANK_DIED)
    assert (died["rank"], died["host"], died["signal"]) == (1, "cn2", signal.SIGKILL)
    segment.touch("end.0")
    assert segment.end()["outcome"] == "completed"


def others_are_refused(site: SegmentsOnBed) -> None:
    """The token opens to the operator what is closed to another user of the nodes."""
    token = site.on("cn2", "sh", "-c", "ls /tmp/et-*/token").strip()
    (head,) = {
        found[1] for line in site.commands("cn2").values() if (found := re.search(r" --address=(\S+)", line))
    }
    facts = {"python": sys.executable, "head": head, "here": site.spec.node_address("cn2")}

    def run(user: str, *lines: str) -> str:
        who = ["setpriv", f"--reuid={USERS[user]}", f"--regid={USERS[user]}", "--clear-groups"]
        quick = "exec 2>&1; cd /tmp; export HOME=/tmp RAY_gcs_rpc_server_connect_timeout_s=1"
        script = "\n".join([quick, *(line.format(**facts) for line in lines), "wait"])
        return site.on("cn2", *who, "sh", "-c", script)

    own = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} "
    assert "DRIVES 2" in run("alice", own + _DRIVE), "what is tried does not work at all"
    refusals = run("bob", f"cat {token}", f"ls {Path(token).parent}")
    assert refusals.count("Permission denied") == 2
    guess = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=" + "0" * 64 + " "
    tried = [name + line for line in (_DRIVE, _JOIN) for name in ("", guess)]
    answers = run("bob", *(f"( {line}; echo CODE $? ) &" for line in tried))
    assert "DRIVES" not in answers
    assert answers.count("CODE") == len(tried)
    assert answers.count("ray.exceptions.AuthenticationError") == len(tried)
    assert "CODE 0" not in answers
    assert "DRIVES 2" in run("alice", own + _DRIVE), "somebody has joined"


@pytest.mark.parametrize("what", ["ray", "step"])
def test_a_node_that_is_lost_is_named_and_ends_the_segment(north: SegmentsOnBed, what: str) -> None:
    segment = north.start(f"lost-{what}")
    segment.started()
    killed = time.time()
    if what == "ray":
        north.kill("cn2", "raylet/raylet")
    else:
        north.kill("cn1", "srun --overlap")
    job = segment.end(killed=what == "step")  # whose input does not end with srun: Slurm's SIGTERM tells it
    assert (job["outcome"], job["exit_code"]) == ("failed", 1)
    (lost,) = segment.events(events.NODE_LOST)
    assert lost["host"] == "cn2"
    assert lost["time"] - killed < 30, "seconds, on a machine that is busy with tests"
    (ended,) = segment.events(events.SEGMENT_ENDED)
    assert ended["reason"] == f"node cn2 was lost: {lost['reason']}"


def test_without_its_supervisor_nothing_goes_on(north: SegmentsOnBed) -> None:
    segment = north.start("deaf-killed")
    segment.started()
    north.kill("cn1", "-m orchestrator.supervisor --slurm", "--entry", "/deaf-killed --entry")
    job = segment.end(killed=True)  # by Slurm, whose job has ended with its batch step
    assert (job["outcome"], job["exit_code"]) == ("failed", 128 + signal.SIGKILL)


def test_a_cancelled_segment_may_still_save(north: SegmentsOnBed) -> None:
    """Slurm sends SIGTERM to everything on all nodes, srun and Ray included; the ranks end by themselves."""
    segment = north.start("cancelled")
    segment.started()
    north.shell("scancel --name cancelled")
    assert segment.end()["outcome"] == "cancelled"
    (ended,) = segment.events(events.SEGMENT_ENDED)
    assert (ended["outcome"], ended["reason"]) == (events.DRAINED, "signal received")
    assert not segment.events(events.RANK_DIED)


def test_what_does_not_heed_a_cancellation_is_killed_everywhere(north: SegmentsOnBed) -> None:
    segment = north.start("deaf-cancelled")
    segment.started()
    north.shell("scancel --name deaf-cancelled")
    assert segment.end(killed=True)["outcome"] == "cancelled"


def test_the_time_limit_ends_it_on_all_nodes(limited: SegmentOnBed) -> None:
    job = limited.end()
    (ended,) = limited.events(events.SEGMENT_ENDED)
    assert (ended["outcome"], job["exit_code"]) == (events.DRAINED, 0)
    assert ended["reason"] in ("time limit of 60 s", "signal received")  # its own clock, or Slurm's signal


def test_a_node_without_power_is_noticed_and_the_chain_goes_on(north: SegmentsOnBed) -> None:
    segment = north.start("dark")
    started = segment.started()
    following = north.start("following", nodes=1, layout={"tp": 1}, after=["dark"])
    cut = time.time()
    north.bed.cut_power("north", "cn2")
    try:
        job = north.wait("dark", "ended", 120.0)
        assert (job["outcome"], job["exit_code"]) == ("failed", 1)
        assert started["hosts"][1] == "cn2"
        (lost,) = segment.events(events.NODE_LOST)
        assert lost["host"] == "cn2"
        assert lost["reason"].startswith("Ray: ")
        assert lost["time"] - cut < 30, "seconds, on a machine that is busy with tests"
        assert following.started()["hosts"] == ["cn1"]
        following.touch("end.0")
        assert north.wait("following", "ended", 120.0)["outcome"] == "completed"
        assert north.left("cn1") == []
    finally:
        north.bed.restore_power("north", "cn2")
        deadline = time.monotonic() + 60
        while not north.bed._idle(north.spec) and time.monotonic() < deadline:
            time.sleep(0.5)
