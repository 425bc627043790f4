"""A site by ssh, with a stand-in that runs the remote command here: exchanges, the agent's way, frames."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import package
from clusters.agent import FRAME, frame
from clusters.connection import Connection, Unreachable
from clusters.ssh import SshConnection, _quoted, unframe
from tests.clusters.fake_ssh import FakeSsh

LOOK = {"op": "jobs", "keys": ["k"]}


@pytest.fixture
def site(tmp_path: Path, fake_ssh: FakeSsh) -> SshConnection:
    return SshConnection("site", str(tmp_path / "the scratch"), tmp_path / "home", sys.executable)


def test_it_is_a_connection(site: SshConnection) -> None:
    connection: Connection = site
    assert connection.exchange([]) == []


def test_the_agent_is_brought_once_and_then_an_exchange_is_one_call(
    site: SshConnection, fake_ssh: FakeSsh
) -> None:
    for _ in range(3):
        (result,) = site.exchange([LOOK])
        assert result["jobs"]["k"]["state"] == "absent"
    assert len(fake_ssh.calls) == 3 + 2, "the first finds no agent, the second brings it"
    assert [p.name for p in (Path(site.scratch) / "agent").iterdir()] == [package.build().name]


def test_an_agent_that_was_purged_is_brought_again(site: SshConnection) -> None:
    site.exchange([LOOK])
    (Path(site.scratch) / "agent" / package.build().name).unlink()
    assert site.exchange([LOOK])[0]["ok"]


def test_what_a_login_shell_prints_does_no_harm(site: SshConnection, fake_ssh: FakeSsh) -> None:
    site.exchange([])
    runs = fake_ssh.works.removeprefix("exec ")
    fake_ssh.does(f'echo "Welcome! {FRAME} 3 abc"; {runs}; code=$?; echo Bye; exit $code')
    assert site.exchange([LOOK])[0]["ok"]


@pytest.mark.parametrize(
    ("shell", "why"),
    [
        (
            "echo Maintenance until Monday",
            "site: no answer from the agent; the site printed 'Maintenance until Monday'",
        ),
        ('sh -c "$last" | head -c 120', "site: the answer was cut short at"),
        ('sh -c "$last" | sed s/absent/abtent/', "site: the answer was garbled on its way"),
        ("echo 'sh: python3: not found' >&2; exit 127", "site: the agent failed: sh: python3: not found"),
        ("exit 142", "site: the agent failed: exit code 142"),
    ],
)
def test_what_is_no_answer(site: SshConnection, fake_ssh: FakeSsh, shell: str, why: str) -> None:
    site.exchange([])
    fake_ssh.does(shell)
    with pytest.raises(Unreachable, match=why):
        site.exchange([LOOK])


def test_an_agent_that_cannot_be_brought(site: SshConnection, fake_ssh: FakeSsh) -> None:
    Path(site.scratch).touch()
    fake_ssh.does('sh -c "$last"; code=$?; [ $code = 1 ] && exit 1; echo "can\'t open file" >&2; exit 2')
    with pytest.raises(Unreachable, match="site: cannot install the agent: "):
        site.exchange([LOOK])
    assert len(fake_ssh.calls) == 2


def test_a_site_with_an_old_python_is_told_so(tmp_path: Path, fake_ssh: FakeSsh) -> None:
    old = tmp_path / "python"
    line = "eurotrain agent: Python 3.6 at /usr/bin/python3 is too old, 3.9 or newer is needed"
    old.write_text(f"#!/bin/sh\necho '{line}' >&2; exit 2\n")
    old.chmod(0o755)
    with pytest.raises(Unreachable, match=f"site: the agent failed: {line}"):
        SshConnection("site", str(tmp_path), tmp_path / "home", str(old)).exchange([LOOK])
    assert len(fake_ssh.calls) == 1


def test_the_agent_ends_before_we_give_up(site: SshConnection, fake_ssh: FakeSsh, tmp_path: Path) -> None:
    fake_ssh.does(f'tee {tmp_path}/request | sh -c "$last"')
    site.exchange([], timeout=30.0)
    assert json.loads((tmp_path / "request").read_text())["timeout"] == 25.0


# ---- small files travel within an exchange; large ones: tests/clusters/test_sites.py


def test_a_small_file_there_and_back(site: SshConnection, tmp_path: Path, fake_ssh: FakeSsh) -> None:
    site.exchange([])
    before = len(fake_ssh.calls)
    (tmp_path / "file").write_bytes(b"\0\xff" * 1000)
    assert site.push(tmp_path / "file", "in/box/a file") == 2000
    assert site.fetch("in/box/a file", tmp_path / "back" / "file") == 2000
    assert (tmp_path / "back" / "file").read_bytes() == b"\0\xff" * 1000
    assert len(fake_ssh.calls) - before == 2
    assert [p.name for p in (Path(site.scratch) / "in" / "box").iterdir()] == ["a file"]
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["file"]


def test_a_file_that_is_not_there(site: SshConnection, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match=r"site: read: .*No such file"):
        site.fetch("none", tmp_path / "none")
    with pytest.raises(Unreachable, match=r"cannot copy .*No such file"):
        site.push(tmp_path / "none", "none")
    assert not (tmp_path / "none").exists()


# ---- frames


@given(st.text(), st.binary(), st.binary())
def test_a_framed_answer_is_found_in_whatever_surrounds_it(answer: str, before: bytes, after: bytes) -> None:
    text = json.dumps(answer)
    if f"\n{FRAME} ".encode() not in after:
        assert unframe(before + frame(text).encode() + after) == text


@given(st.text(min_size=1).map(json.dumps), st.data())
def test_half_an_answer_is_none(text: str, data: st.DataObject) -> None:
    whole = frame(text).encode()
    cut = data.draw(st.integers(0, len(whole) - 2))  # the last byte is a line break that nobody needs
    with pytest.raises(Unreachable):
        unframe(whole[:cut])


@given(st.binary())
def test_anything_else_is_none(output: bytes) -> None:
    for text in (output, b"\n" + FRAME.encode() + b" " + output):
        with pytest.raises(Unreachable) as caught:
            unframe(text)
        assert len(str(caught.value)) < 400


def test_a_file_name_is_quoted_for_sftp() -> None:
    assert _quoted("/a b/[x]*'\"#") == "/a\\ b/\\[x\\]\\*\\'\\\"\\#"
    with pytest.raises(ValueError, match="must not have a line break"):
        _quoted("a\nb")


# ---- a module at the far end of a pipe


def test_a_module_runs_with_the_streams_of_the_caller(site: SshConnection, fake_ssh: FakeSsh) -> None:
    words = site.pipe(sys.executable, "base64")
    done = subprocess.run(words, input=b"abc", capture_output=True, check=False)
    assert done.stdout == b"YWJj\n"
    assert words[0] == "ssh"
    assert site.session.budget.read().commands == 2, "one to try the module, one to run it"


def test_the_data_mover_is_used_where_it_runs_the_module(tmp_path: Path, fake_ssh: FakeSsh) -> None:
    site = SshConnection("site", str(tmp_path), tmp_path / "home", carrier="mover")
    assert "mover" in site.pipe(sys.executable, "base64")
    fake_ssh.does(
        'case "$*" in *mover*) echo "This service allows sftp only." >&2; exit 1;; esac; ' + fake_ssh.works
    )
    again = SshConnection("site", str(tmp_path), tmp_path / "home", carrier="mover")
    assert "mover" not in again.pipe(sys.executable, "base64")
    assert "site" in again.pipe(sys.executable, "base64")


def test_a_module_that_is_not_there_says_what_to_look_at(site: SshConnection) -> None:
    with pytest.raises(Unreachable, match=r"site: \S+ cannot run absent.mod: .*No module named 'absent'"):
        site.pipe(sys.executable, "absent.mod")
    with pytest.raises(Unreachable, match=r"site: /no/python cannot run base64: .*not found"):
        site.pipe("/no/python", "base64")
