"""One model across two real Slurm sites: jobs by sbatch, everything else over SSH."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from orchestrator.home import Home
from tests.testbed import demo
from tests.testbed.bed import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_two_slurm_sites_train_one_model(testbed: Testbed, tmp_path: Path) -> None:
    assert demo.launch(testbed, Home(tmp_path), demo.INNER_STEPS) == 0
    (path,) = tmp_path.glob("runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["outcome"] == "completed"
    assert summary["rounds"] == 1
    assert summary["rounds_closed_without"] == {}
    assert summary["loss_last"] < summary["loss_first"]
    assert [island["unit"] for island in summary["islands"]] == ["GPU-hour"] * 2
    for site, island in zip(testbed.sites, summary["islands"], strict=True):
        told = testbed.ssh(site.name, f"sacct -XPn -o state --name={summary['run']}.{site.name}.0000").stdout
        assert told.split() == ["COMPLETED"], "the segment was not one job of this site's Slurm"
        assert 0 < island["unit_hours"] < 0.6667, "more than nothing, less than the reservation"
    hosts = {site.name: ranks_hosts(tmp_path, site.name) for site in testbed.sites}
    assert hosts["north"] == ["cn1", "cn2"], "one model on two nodes"
    assert len({*hosts["south"]}) == 1
    assert not list(tmp_path.glob("segments")), "something ran here instead of at the sites"


def ranks_hosts(home: Path, site: str) -> list[str]:
    """By rank: the nodes of an island's ranks, as its supervisor told the controller."""
    with sqlite3.connect(home / "eurotrain.db") as log:
        query = "SELECT facts FROM events WHERE kind = 'ranks.started' AND site = ?"
        ((facts,),) = log.execute(query, [site]).fetchall()
    return list(json.loads(facts)["hosts"])
