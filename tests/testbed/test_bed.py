"""The test bed itself: two Slurm sites that are apart, and nothing left when they are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.testbed.bed import ROOT, Testbed, missing
from tests.testbed.fixture import require

pytestmark = pytest.mark.slurm


def traces() -> dict[str, set[str]]:
    """What a test bed could leave behind on this machine itself."""
    mounts = {line.split(" ", 4)[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    devices = {str(p) for p in Path("/dev").rglob("*") if p.parts[2] not in ("pts", "shm")}
    return {
        "mounts": mounts,
        "interfaces": {p.name for p in Path("/sys/class/net").iterdir()},
        "devices": devices,
        "run": {str(p) for p in Path("/run").iterdir()},
        "routes": set(Path("/proc/net/route").read_text().splitlines()),
    }


def rooms(process: Path | str) -> set[str]:
    """The namespaces of a process: of network, processes and mounts."""
    try:
        return {str((Path(process) / "ns" / kind).readlink()) for kind in ("net", "pid", "mnt")}
    except OSError:  # ended while we looked
        return set()


def rooms_of(bed: Path) -> set[str]:
    """The namespaces that a test bed made."""
    holder = psutil.Process(json.loads((bed / "holder").read_text())[0])
    inside = [holder, *holder.children(recursive=True)]
    return set().union(*(rooms(f"/proc/{process.pid}") for process in inside)) - rooms("/proc/self")


def inhabitants(made: set[str]) -> list[str]:
    """Processes in any of these namespaces. Other test beds have their own."""
    found = (p for p in Path("/proc").glob("[0-9]*") if rooms(p) & made)
    return [f"{p.name} {(p / 'cmdline').read_bytes()!r}" for p in found]


def assert_gone(made: set[str], before: dict[str, set[str]]) -> None:
    deadline = time.monotonic() + 20
    while (left := inhabitants(made)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert traces() == before


def test_up_and_down_leaves_no_trace(tmp_path: Path) -> None:
    require()
    before = traces()
    command = [sys.executable, "-m", "tests.testbed", "--directory", str(tmp_path / "bed")]
    up = subprocess.run([*command, "up", "--energy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stderr
    assert traces() == before, "nothing is seen on the machine even while it is up"
    made = rooms_of(tmp_path / "bed")
    assert sum(room.startswith("net:") for room in made) == 7, (
        "six machines and the operator's end of the WAN"
    )
    assert len(inhabitants(made)) > 20
    again = subprocess.run([*command, "up"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr == f"{tmp_path / 'bed'} holds a test bed already; take it down first\n"
    subprocess.run([*command, "down"], cwd=ROOT, check=True)
    assert_gone(made, before)
    assert not (tmp_path / "bed").exists()


def test_it_ends_with_the_process_that_owns_it(tmp_path: Path) -> None:
    require()
    before = traces()
    script = "import sys, time; from pathlib import Path; from tests.testbed.bed import Testbed\n"
    script += "Testbed(Path(sys.argv[1])).up(); print('up', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(tmp_path / "bed")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == b"up\n"
        made = rooms_of(tmp_path / "bed")
        owner.kill()
    assert_gone(made, before)


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


def test_ci_does_not_pass_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("EUROTRAIN_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="the test bed needs root"):
        require()
    monkeypatch.setenv("EUROTRAIN_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="the test bed needs root"):
        require()


def test_a_test_bed_that_does_not_come_up_says_why_and_leaves_only_its_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require()
    bed = Testbed(tmp_path / "bed")
    monkeypatch.setenv("TMPDIR", "/proc")  # where no database can be made
    with pytest.raises(RuntimeError, match=r"the test bed does not come up: .*mariadb-install-db"):
        bed.up()
    assert (
        str(bed.directory)
        not in subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout
    )
    assert (bed.directory / "keeper.log").exists()
    monkeypatch.delenv("TMPDIR")
    with bed:  # what was left does not matter
        assert bed.ssh("north", "sinfo -h").stdout


def test_shared_sessions_do_not_keep_it_alive(tmp_path: Path) -> None:
    require()
    before = traces()
    with Testbed(tmp_path / "bed") as bed, tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        share = ["-o", "ControlMaster=auto", "-o", f"ControlPath={sockets}/c", "-o", "ControlPersist=600"]
        command = ["ssh", "-F", str(bed.ssh_config), *share, "north", "true"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (session,) = map(psutil.Process, bed._sessions())
        made = rooms_of(bed.directory)
        bed.down()
        session.wait(10)
    assert_gone(made, before)
