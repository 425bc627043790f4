"""What the machine gives, read from made-up cgroups, mounts and programs."""

import math
import os
import resource
from pathlib import Path

import pytest

from orchestrator import machine
from orchestrator.home import Home
from orchestrator.machine import GIB, Check, enough


def program(folder: Path, name: str, script: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_enough_is_ok_and_less_says_how_much_is_needed() -> None:
    assert enough("files", 8.0, 8.0, str, "more") == Check("files", "ok", "8.0")
    assert enough("files", 7.0, 8.0, str, "more") == Check(
        "files", "warning", "7.0; the demo needs 8.0", "more"
    )
    assert enough("disk", 1.0, 0.0, str, "", Path("/x")).detail == "1.0 free at /x"


def test_cores_are_those_that_may_be_used(tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0))
    assert machine.cores(tmp_path) == affinity
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cores(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cores(tmp_path) == affinity


def test_memory_ends_at_the_limit_of_the_container(tmp_path: Path) -> None:
    assert machine.memory(tmp_path) > 1e6
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine.memory(tmp_path) == 1048576


def test_the_tightest_limit_on_the_way_to_the_root_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_text
    own = "12:pids:/elsewhere\n0::/system.slice/job_7/step_0\n"
    monkeypatch.setattr(
        Path, "read_text", lambda path: own if path == Path("/proc/self/cgroup") else real(path)
    )
    step = tmp_path / "system.slice" / "job_7" / "step_0"
    step.mkdir(parents=True)
    for folder, limit in ((step, "max"), (step.parent, "300"), (tmp_path, "400"), (tmp_path.parent, "1")):
        (folder / "pids.max").write_text(limit)
    assert machine.processes(tmp_path) == 300


def test_processes_without_a_container_are_limited_by_the_user(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    expected = math.inf if limit == resource.RLIM_INFINITY else limit
    assert machine.processes(tmp_path) == expected


def test_unlimited_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    check = next(c for c in machine.checks(Home(Path("/nowhere"))) if c.name == "open files")
    assert check == Check("open files", "ok", "unlimited")


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    found = {check.name: check for check in machine.checks(Home(Path("/nowhere")))}
    assert found["open files"] == Check(
        "open files", "warning", "4096; the demo needs 8192", "raise `ulimit -Hn`"
    )
    assert found["processes"].status == "ok"


def test_space_is_that_of_the_disk_where_the_folder_will_be(tmp_path: Path) -> None:
    assert machine.free(tmp_path / "not" / "yet") == pytest.approx(machine.free(tmp_path), abs=GIB)


def test_shared_memory_must_be_there(tmp_path: Path) -> None:
    assert machine.shared_memory(tmp_path / "absent").status == "error"
    assert str(tmp_path) in machine.shared_memory(tmp_path).detail


MOUNTS = """\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:5 / /users rw - lustre 10.0.0.1@o2ib:/users rw
"""


class TestFileSystem:
    @pytest.fixture
    def mounts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.delenv("EUROTRAIN_DATABASE", raising=False)
        (tmp_path / "mounts").write_text(MOUNTS)
        return tmp_path / "mounts"

    def test_a_local_one(self, mounts: Path) -> None:
        check = machine.file_system_kind(Home(Path("/var/eurotrain")), mounts)
        assert check == Check("file system", "ok", "ext4 at /var/eurotrain")

    def test_a_network_one_cannot_hold_the_event_log(self, mounts: Path) -> None:
        check = machine.file_system_kind(Home(Path("/users/me")), mounts)
        assert check.status == "warning"
        assert "/users/me/eurotrain.db lies on a network file system (lustre)" in check.detail
        assert "EUROTRAIN_DATABASE" in check.advice

    def test_unless_it_is_in_another_database(self, mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EUROTRAIN_DATABASE", "postgresql://me@db/eurotrain")
        check = machine.file_system_kind(Home(Path("/users/me")), mounts)
        assert check == Check("file system", "ok", "lustre; the event log is in another database")


class TestPrograms:
    def test_openssh_tells_its_version(self, path: Path) -> None:
        program(path, "ssh", "echo 'OpenSSH_9.2p1 Debian-2+deb12u10, OpenSSL 3.0.19' >&2")
        assert machine.openssh() == Check("OpenSSH", "ok", "9.2p1")

    def test_another_ssh(self, path: Path) -> None:
        program(path, "ssh", "echo 'Dropbear v2024.86' >&2")
        assert machine.openssh() == Check("OpenSSH", "warning", "ssh is Dropbear v2024.86", "install OpenSSH")

    def test_no_ssh(self, path: Path) -> None:
        assert machine.openssh().status == "absent"

    def test_slurm_whole_missing_and_in_part(self, path: Path) -> None:
        assert machine.slurm().status == "absent"
        for command in machine.SLURM[1:]:
            program(path, command)
        assert machine.slurm() == Check(
            "Slurm", "warning", "sbatch not on PATH", "load the site's Slurm module"
        )
        program(path, "sbatch")
        assert machine.slurm().status == "ok"
