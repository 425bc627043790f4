"""The operator's OpenSSH: what it is told, what its failures mean, whose sessions are used."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from clusters import ssh_session
from clusters.connection import Unreachable
from clusters.ssh_budget import Budget
from clusters.ssh_session import Session, private_directory
from tests.clusters.fake_ssh import FakeSsh


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("site", Budget(tmp_path / "site.json", "site"))


def listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def test_the_command_its_output_and_its_exit_code(session: Session, fake_ssh: FakeSsh) -> None:
    done = session.command("cat; echo err >&2; exit 3", b"in")
    assert (done.code, done.output, done.errors) == (3, b"in", "err\n")
    (call,) = fake_ssh.calls
    assert call.startswith("-o BatchMode=yes -o ConnectTimeout=15 -T site ")


def test_an_operator_who_shares_sessions_is_left_alone(session: Session, fake_ssh: FakeSsh) -> None:
    session.command("true")
    assert "Control" not in fake_ssh.calls[0]
    assert session.remedy() == "type `ssh site`"


def test_for_an_operator_who_does_not_the_session_is_ours(session: Session, fake_ssh: FakeSsh) -> None:
    fake_ssh.configured("controlpath none")
    words = " ".join(session.options())
    assert f"-o ControlMaster=auto -o ControlPath={private_directory()}/%C" in words
    assert "-o ServerAliveInterval=20" in words


def test_a_live_session_costs_no_connection(session: Session, fake_ssh: FakeSsh) -> None:
    session.command("true")
    assert session.budget.read().connections == 1
    with listen(fake_ssh.folder / "none"):
        session.command("true")
        assert session.is_live()
    assert session.budget.read().connections == 1
    assert not session.is_live(), "its owner is dead, though its socket is still there"
    session.command("true")
    assert session.budget.read().connections == 2


@pytest.mark.parametrize(
    "line",
    [
        "alice@site: Permission denied (publickey,keyboard-interactive).",
        "Received disconnect from 10.0.0.1 port 22:2: Too many authentication failures",
        "Host key verification failed.",
    ],
)
def test_a_refusal_is_told_with_what_to_type_and_not_repeated(
    session: Session, fake_ssh: FakeSsh, line: str
) -> None:
    fake_ssh.does(f"echo '{line}' >&2; exit 255")
    for _ in range(3):
        with pytest.raises(Unreachable) as caught:
            session.command("true")
        assert str(caught.value) == f"site: {line}; type `ssh site`"
    assert len(fake_ssh.calls) == 1


def test_new_credentials_are_tried_once(session: Session, fake_ssh: FakeSsh, tmp_path: Path) -> None:
    key = tmp_path / "id"
    key.write_text("old")
    fake_ssh.configured(f"controlpath {fake_ssh.folder}/none", f"identityfile {key}")
    fake_ssh.does("echo 'Permission denied (publickey).' >&2; exit 255")
    for content in ("old", "old", "a new one", "a new one"):
        if key.read_text() != content:
            key.write_text(content)
        with pytest.raises(Unreachable, match="Permission denied"):
            session.command("true")
    assert len(fake_ssh.calls) == 2
    (tmp_path / "id-cert.pub").write_text("a certificate")
    fake_ssh.does(fake_ssh.works)
    assert session.command("true").code == 0


def test_a_network_failure_is_followed_by_a_pause(session: Session, fake_ssh: FakeSsh) -> None:
    fake_ssh.does("echo 'ssh: connect to host site port 22: Connection refused' >&2; exit 255")
    with pytest.raises(Unreachable, match="site: ssh: ssh: connect to host site port 22: Connection refused"):
        session.command("true")
    with pytest.raises(Unreachable, match="site: 1 failures in a row, next try in"):
        session.command("true")
    assert len(fake_ssh.calls) == 1


def test_a_command_that_hangs_is_given_up(session: Session, fake_ssh: FakeSsh) -> None:
    fake_ssh.does("exec sleep 30")
    began = time.monotonic()
    with pytest.raises(Unreachable, match="site: no answer within 0 s"):
        session.command("true", timeout=0.4)
    assert time.monotonic() - began < 5
    assert session.budget.read().failures == 1


def test_a_session_that_stays_behind_does_not_hold_the_command(session: Session, fake_ssh: FakeSsh) -> None:
    fake_ssh.does("sleep 5 >/dev/null </dev/null & echo done")  # keeps stderr, as old ssh's masters do
    began = time.monotonic()
    assert session.command("true").output == b"done\n"
    assert time.monotonic() - began < 4


def test_a_configuration_that_ssh_refuses(session: Session, fake_ssh: FakeSsh) -> None:
    (fake_ssh.folder / "ssh").write_text(
        "#!/bin/sh\necho 'config line 3: Bad configuration option' >&2; exit 255\n"
    )
    with pytest.raises(Unreachable, match="site: ssh: config line 3: Bad configuration option"):
        session.command("true")


def test_when_a_certificate_ends(session: Session, fake_ssh: FakeSsh, tmp_path: Path) -> None:
    key = tmp_path / "id"
    fake_ssh.configured("controlpath none", f"identityfile {key}", "identityagent none")
    assert session.certificate_ends() is None
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", ""]
    for name in ("id", "authority"):
        subprocess.run([*keygen, "-f", str(tmp_path / name)], check=True)
    sign = ["ssh-keygen", "-q", "-s", str(tmp_path / "authority"), "-I", "me", "-n", "me"]
    subprocess.run([*sign, "-V", "+2h", f"{key}.pub"], check=True)
    ends = session.certificate_ends()
    assert ends is not None
    assert abs(ends - time.time() - 7200) < 120
    subprocess.run([*sign, f"{key}.pub"], check=True)
    assert session.certificate_ends() == float("inf")


def test_the_private_directory_is_private_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "x" * 90)
    path = private_directory()
    assert path == Path(f"/tmp/eurotrain-{os.getuid()}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert len(str(path)) + len("/") + 40 + 17 < 104, "with ssh's hash, and the suffix while it is being made"


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_directory_that_others_can_enter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(ssh_session, "_ROOM", 999)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = tmp_path / f"eurotrain-{os.getuid()}"
    if kind == "open":
        path.mkdir(0o755)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.touch()
    with pytest.raises((ValueError, FileExistsError)):
        private_directory()


def test_another_configuration_has_sessions_of_its_own(tmp_path: Path) -> None:
    """Two configurations may mean two machines by one name, as two test beds at once do."""
    paths = set()
    for name in ("one", "two"):
        config = tmp_path / name
        config.write_text("Host lumi\n  HostName 127.0.0.1\n")
        paths.add(Session("lumi", Budget(tmp_path / "budget.json", "lumi"), config).control_path())
    assert len(paths) == 2
    assert all(len(str(path)) + 17 <= 104 for path in paths)  # ssh appends 17 characters while it binds
