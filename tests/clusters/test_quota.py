"""Quotas in the words of those who keep them; where nobody tells, unknown is the answer."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import quota
from clusters.paths import SitePaths
from clusters.quota import Quota, mounted, parse_gpfs, parse_table
from tests.clusters.test_agent import ask

# Forms as the manuals of Lustre, quota(1) and IBM Storage Scale show them; names and figures are made up.
LUSTRE = """\
Disk quotas for usr alice (uid 1000):
     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
       /scratch   20480  1048576 2097152      -     300    5000   10000       -
uid 1000 is using default block quota setting
"""
WRAPPED = """\
Disk quotas for prj 1234 (pid 1234):
     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
/a/file/system/with/a/long/name
                [2097153]* 1048576 2097152 6d23h59m  10001*      0   10000       -
"""
UNLIMITED = """\
Disk quotas for grp users (gid 100):
     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
       /scratch       4       0       0       -       1       0       0       -
"""
LINUX = """\
Disk quotas for user alice (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
   server:/home   20480   51200   61440       0     300       0       0       0
"""
HEADER = (
    "mmlsquota::HEADER:version:reserved:reserved:filesystemName:quotaType:id:name:blockUsage:blockQuota:"
    "blockLimit:blockInDoubt:blockGrace:filesUsage:filesQuota:filesLimit:filesInDoubt:filesGrace:remarks:"
    "quota:defQuota:fid:filesetname:"
)
GPFS = (
    f"{HEADER}\nmmlsquota::0:1:::gpfs1:USR:1000:alice:2048:10240:12288:0:none:400:0:500:0:none:e:on:off:::\n"
)
KIB = 1024


@pytest.mark.parametrize(
    ("text", "size", "files"),
    [
        (LUSTRE, (1048576 - 20480) * KIB, 4700),
        (WRAPPED, (1048576 - 2097153) * KIB, -1),
        (UNLIMITED, None, None),
        (LINUX, (51200 - 20480) * KIB, None),
    ],
)
def test_tables(text: str, size: int | None, files: int | None) -> None:
    assert parse_table("w", text) == Quota("w", size, files)


def test_gpfs_is_read_by_the_names_in_its_header() -> None:
    assert parse_gpfs("w", GPFS) == Quota("w", 8192 * KIB, 100)
    assert parse_gpfs("w", GPFS.replace(":10240:12288:", ":0:0:")) == Quota("w", None, 100)


@pytest.mark.parametrize("parse", [parse_table, parse_gpfs])
@pytest.mark.parametrize(
    "text", ["", "lfs quota: '/x' not on a mounted Lustre filesystem", HEADER, "grace\ngrace x"]
)
def test_what_is_no_quota(parse: object, text: str) -> None:
    with pytest.raises(ValueError, match="it says"):
        parse("w", text)  # type: ignore[operator]


@given(st.text())
def test_any_text_is_a_quota_or_none(text: str) -> None:
    for parse in (parse_table, parse_gpfs):
        for around in (text, f"grace grace {text}", f"{HEADER}\nmmlsquota{text}"):
            with contextlib.suppress(ValueError):
                assert isinstance(parse("w", around), Quota)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/scratch/project/me", ("mds@tcp:/fs1", "/scratch", "lustre")),
        ("/scratch2/x", ("/dev/sda", "/", "ext4")),
        ("/with blank/x", ("nfs:/x", "/with blank", "nfs4")),
        ("/home/me", ("home2", "/home", "gpfs")),  # mounted over another
    ],
)
def test_the_file_system_of_a_path(path: str, expected: tuple[str, str, str]) -> None:
    mounts = (
        "/dev/sda / ext4 rw 0 0\nmds@tcp:/fs1 /scratch lustre rw 0 0\nnfs:/x /with\\040blank nfs4 rw 0 0\n"
        "home1 /home nfs rw 0 0\nhome2 /home gpfs rw 0 0\n"
    )
    assert mounted(Path(path), mounts) == expected


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing else in it."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def program(folder: Path, name: str, shell: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{shell}\n")
    (folder / name).chmod(0o755)


def on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "mounted", lambda *_: ("mds:/fs", "/scratch", kind))


def test_lustre_is_asked_for_user_group_and_project(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("lustre", monkeypatch)
    answer = "cat <<'END'\n" + LUSTRE + "END"
    script = f'echo "$*" >> {tmp_path}/calls; [ $1 = project ] && {{ echo "  77 P $3"; exit; }}\n'
    program(programs, "lfs", script + "PATH=/bin:/usr/bin\n" + answer)
    told = quota.room(SitePaths(tmp_path / "not there yet"))
    assert told["unknown"] == ""
    assert [q["whose"].split()[0] for q in told["quotas"]] == ["user", "group", "project"]
    assert told["quotas"][2] == {
        "whose": "project 77",
        "bytes_left": (1048576 - 20480) * KIB,
        "files_left": 4700,
    }
    assert "quota -p 77 /scratch" in (tmp_path / "calls").read_text()
    assert told["free_bytes"] > 0


@pytest.mark.parametrize(
    ("kind", "shell", "why"),
    [
        ("lustre", None, "lfs: not installed"),
        ("gpfs", "echo 'mmlsquota: no quota here' >&2; exit 1", "mmlsquota: mmlsquota: no quota here"),
        ("gpfs", "exit 1", "mmlsquota: it fails without a word"),
        ("xfs", "exit 0", "quota: it says ''"),
        ("beegfs", None, "no command is known for beegfs"),
    ],
)
def test_what_nobody_tells_is_unknown(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shell: str | None, why: str
) -> None:
    on(kind, monkeypatch)
    if shell:
        for name in ("mmlsquota", "quota"):
            program(programs, name, shell)
    told = quota.room(SitePaths(tmp_path))
    assert (told["quotas"], told["unknown"]) == ([], why)


def test_a_command_that_hangs_is_given_up(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("gpfs", monkeypatch)
    monkeypatch.setattr(quota, "_SECONDS", 0.2)
    program(programs, "mmlsquota", "exec /bin/sleep 60")
    assert quota.room(SitePaths(tmp_path))["unknown"] == "mmlsquota: it does not answer"


def test_the_agent_tells(tmp_path: Path) -> None:
    (told,) = ask(tmp_path, {"op": "room"})
    assert told["ok"]
    assert told["filesystem"]
