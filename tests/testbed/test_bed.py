"""The test bed itself: two Slurm sites that are apart, and nothing left when they are gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.testbed.bed import ROOT, Testbed, missing

pytestmark = pytest.mark.slurm


def namespaces_of_networks() -> set[str]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(str(entry.readlink()))
        except OSError:  # ended while we looked
            continue
    return found


def traces() -> dict[str, set[str]]:
    """What a test bed could leave behind on this machine, the processes of others aside."""
    mounts = {line.split(" ", 4)[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    devices = {str(p) for p in Path("/dev").rglob("*") if p.parts[2] not in ("pts", "shm")}
    daemons = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    words = ("slurm", "munged", "mariadb", "sshd", "tests.testbed", "unshare")
    return {
        "mounts": mounts,
        "network namespaces": namespaces_of_networks(),
        "interfaces": {p.name for p in Path("/sys/class/net").iterdir()},
        "devices": devices,
        "processes": {line for line in daemons.splitlines() if any(word in line for word in words)},
        "run": {str(p) for p in Path("/run").iterdir()},
        "routes": set(Path("/proc/net/route").read_text().splitlines()),
    }


@pytest.fixture
def possible() -> None:
    if why := missing():
        pytest.skip(why)


@pytest.mark.usefixtures("possible")
def test_up_and_down_leaves_no_trace(tmp_path: Path) -> None:
    before = traces()
    command = [sys.executable, "-m", "tests.testbed", "--directory", str(tmp_path / "bed")]
    up = subprocess.run([*command, "up", "--energy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stderr
    during = traces()
    assert len(during["network namespaces"]) >= len(before["network namespaces"]) + 7, "6 machines and a hub"
    for what in ("mounts", "interfaces", "devices", "routes", "run"):
        assert during[what] == before[what], "seen on the host even while it is up"
    again = subprocess.run([*command, "up"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr == f"{tmp_path / 'bed'} holds a test bed already; take it down first\n"
    subprocess.run([*command, "down"], cwd=ROOT, check=True)
    assert traces() == before
    assert not (tmp_path / "bed").exists()


@pytest.mark.usefixtures("possible")
def test_it_ends_with_the_process_that_owns_it(tmp_path: Path) -> None:
    before = traces()
    script = "import sys, time; from pathlib import Path; from tests.testbed.bed import Testbed\n"
    script += "Testbed(Path(sys.argv[1])).up(); print('up', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(tmp_path / "bed")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == b"up\n"
        owner.kill()
    deadline = time.monotonic() + 20
    while traces() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces() == before


def test_the_sites_know_nothing_of_each_other(testbed: Testbed) -> None:
    for site, gpu in (("north", "a100"), ("south", "mi250")):
        told = testbed.ssh(site, "hostname; sinfo -h -o '%G %D' | sort -u; ls /home /srv/scratch /tmp").stdout
        assert told.splitlines()[:2] == ["login", f"gpu:{gpu}:4 2"]
    testbed.ssh("north", "echo here > /srv/scratch/file")
    assert testbed.ssh("south", "cat /srv/scratch/file", check=False).returncode == 1
    testbed.ssh("north", "rm /srv/scratch/file")


def test_a_job_has_its_gpus_and_its_site_file_system(testbed: Testbed) -> None:
    job = "srun -N2 --gres=gpu:4 sh -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES >> /srv/scratch/seen'"
    testbed.ssh("south", job)
    seen = testbed.ssh("south", "sort /srv/scratch/seen; rm /srv/scratch/seen").stdout
    assert seen.split("\n")[:2] == ["cn1 0,1,2,3", "cn2 0,1,2,3"]


def test_compute_nodes_reach_the_wan_only_where_the_site_lets_them(testbed: Testbed) -> None:
    dial = (sys.executable, "-c", "import socket; socket.create_connection(('10.99.2.1', 22), 3)")
    assert testbed.root("south", "cn1", *dial, check=False).returncode == 0
    dial = (sys.executable, "-c", "import socket; socket.create_connection(('10.99.1.1', 22), 3)")
    assert testbed.root("north", "login", *dial, check=False).returncode == 0
    away = (sys.executable, "-c", "import socket; socket.create_connection(('10.99.2.1', 22), 3)")
    assert testbed.root("north", "cn1", *away, check=False).returncode == 1


def test_the_wan_has_a_delay_and_can_be_cut(testbed: Testbed) -> None:
    def seconds() -> float:
        began = time.monotonic()
        testbed.ssh("north", "true", timeout=20)
        return time.monotonic() - began

    near = min(seconds() for _ in range(3))
    testbed.wan({"delay_ms": 100.0})
    try:
        far = min(seconds() for _ in range(2))
    finally:
        testbed.wan()
    assert far > near + 0.8, "a new SSH connection takes at least five round trips"
    with testbed.partition("north"), pytest.raises(subprocess.TimeoutExpired):
        testbed.ssh("north", "true", timeout=2)
    assert seconds() < 20


def test_a_node_that_loses_power_is_found_down_and_comes_back(testbed: Testbed) -> None:
    testbed.cut_power("south", "cn2")
    assert wait_for_states(testbed, "south", {"idle", "down*"}, 60)
    testbed.restore_power("south", "cn2")
    assert wait_for_states(testbed, "south", {"idle"}, 60)


def wait_for_states(bed: Testbed, site: str, states: set[str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if set(bed.root(site, "login", "sinfo", "-hN", "-o", "%t").stdout.split()) == states:
            return True
        time.sleep(0.5)
    return False


def test_where_it_cannot_come_up_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "the test bed needs root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program, path: None if program == "slurmd" else program)
    assert missing() == "the test bed needs slurmd (tests/testbed/packages.txt)"
