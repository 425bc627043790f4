"""A poll beside squeue by hand: both go over the operator's ssh, in turns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from clusters import package
from orchestrator.cli import main
from tests.clusters.fake_slurm import FakeSlurm
from tests.clusters.fake_ssh import FakeSsh


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    """An operator with a site behind ssh, where Slurm is, and one on this machine."""
    folder, programs = tmp_path / "home", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    monkeypatch.setenv("EUROTRAIN_HOME", str(folder))
    (folder / "sites.toml").write_text(
        f'[far]\ncatalogue = "leonardo"\nhost = "far"\nscratch = "{tmp_path}/scratch"\n'
        f'[here]\ncatalogue = "local"\nscratch = "{tmp_path}/here"\n'
    )
    FakeSlurm(programs).install(monkeypatch)
    fake = FakeSsh(programs)
    fake.install(monkeypatch)
    (programs / "python3").symlink_to(sys.executable)
    agent = tmp_path / "scratch" / "agent" / package.build().name
    agent.parent.mkdir(parents=True)
    agent.write_bytes(package.build().content)
    return fake


def test_they_take_turns_and_the_first_of_each_is_not_counted(ssh: FakeSsh) -> None:
    done = CliRunner().invoke(main, ["bench", "poll", "far", "-n", "2", "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.output)
    assert (row["repetitions"], row["peer_name"], row["unit"]) == (2, "ssh squeue --me", "s")
    assert row["eurotrain"]["min"] > 0
    assert row["peer"]["min"] > 0
    kinds = ["squeue" if call.endswith("squeue --me") else "poll" for call in ssh.calls]
    assert kinds == ["poll", "squeue"] * 3


@pytest.mark.parametrize(
    ("site", "code", "why"),
    [("here", 2, "here is on this machine"), ("farr", 2, "unknown site 'farr': did you mean 'far'?")],
)
def test_what_cannot_be_compared(ssh: FakeSsh, site: str, code: int, why: str) -> None:
    done = CliRunner().invoke(main, ["bench", "poll", site])
    assert (done.exit_code, why in done.output) == (code, True)
    assert ssh.calls == []


def test_a_site_that_does_not_answer(ssh: FakeSsh) -> None:
    ssh.does("echo 'ssh: connect to host far port 22: Connection refused' >&2; exit 255")
    done = CliRunner().invoke(main, ["bench", "poll", "far"])
    assert done.exit_code == 1
    assert "Connection refused" in done.output
