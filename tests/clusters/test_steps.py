"""Nodes of a job and steps on them: what Slurm is asked, without a Slurm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clusters.steps import node_names, step
from tests.clusters.fake_slurm import FakeSlurm


def test_slurm_is_asked_for_the_names(fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("scontrol", "cn1\ncn2\ngpu04\n")
    job = {"SLURM_JOB_NODELIST": "cn[1-2],gpu04", "SLURMD_NODENAME": "cn1"}
    assert node_names(job) == ["cn1", "cn2", "gpu04"]
    (call,) = fake_slurm.calls("scontrol")
    assert call.endswith("/scontrol show hostnames cn[1-2],gpu04")


def test_the_node_of_the_batch_script_comes_first(fake_slurm: FakeSlurm) -> None:
    fake_slurm.says("scontrol", "cn1\ncn2\ncn3\n")
    assert node_names({"SLURM_JOB_NODELIST": "x", "SLURMD_NODENAME": "cn2"}) == ["cn2", "cn1", "cn3"]


def test_outside_of_a_job_it_is_said(fake_slurm: FakeSlurm) -> None:
    with pytest.raises(ValueError, match=r"^SLURM_JOB_NODELIST is not set: this is no job of Slurm$"):
        node_names({})
    assert fake_slurm.calls("scontrol") == []


@pytest.mark.parametrize(
    ("does", "why"), [("echo 'Invalid  hostlist' >&2; exit 1", "Invalid hostlist"), ("true", "no answer")]
)
def test_what_slurm_cannot_tell_is_one_line(fake_slurm: FakeSlurm, does: str, why: str) -> None:
    fake_slurm.does("scontrol", does)
    with pytest.raises(ValueError, match=rf"^scontrol show hostnames cn\[: {why}$"):
        node_names({"SLURM_JOB_NODELIST": "cn["})


def test_without_slurm_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"^scontrol show hostnames cn1: .*No such file"):
        node_names({"SLURM_JOB_NODELIST": "cn1"})


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no Slurm here")
def test_the_real_scontrol_knows_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=here\nSlurmctldHost=here\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    listed = "cn[1-3,007],rack[1-2]n[01-02],solo"
    names = ["cn1", "cn2", "cn3", "cn007", "rack1n01", "rack1n02", "rack2n01", "rack2n02", "solo"]
    assert node_names({"SLURM_JOB_NODELIST": listed}) == names


def test_a_step_is_one_task_on_one_node_that_takes_nothing_down_with_it() -> None:
    words = step("cn2", ["python", "-P", "x"])
    assert words[0] == "srun"
    assert words[-3:] == ["python", "-P", "x"]
    expected = {"--nodelist=cn2", "--nodes=1", "--ntasks=1", "--overlap", "--no-kill", "--kill-on-bad-exit=0"}
    assert expected <= {*words}
