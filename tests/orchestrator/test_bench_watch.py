"""What watching costs: the figures are of a run that is really watched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from clusters import events as site_kinds
from orchestrator import bench_watch
from orchestrator.bench_watch import _programs, _World
from orchestrator.cli import main
from orchestrator.views import watch_table
from tests.orchestrator.story import drawn

FIGURES = ("controller_cpu_seconds", "agents_cpu_seconds", "bare_parse_cpu_seconds")


def test_every_job_is_seen_and_every_step_that_was_told(tmp_path: Path) -> None:
    with _programs(tmp_path / "bin"):
        world = _World(tmp_path, sites=2, jobs=7, interval=1.0)
        try:
            facts = world.measure(cycles=1, talking=3)
            islands = world.campaign.state.islands.values()
            told = [e for e in world.store.events("watched-aaaaaa") if e.kind == site_kinds.STEP]
            alerts = world.campaign.state.alerts
        finally:
            world.close()
    assert alerts == []
    assert [len(island.segments) for island in islands] == [7, 7]
    assert [island.step for island in islands] == [2, 2]
    assert len(told) == 2 * 3 * 2, "of two sites, three jobs each, in two intervals"
    for site in world.sites.values():
        _, jobs, events, *_ = site.counted.heard[0]
        assert {job["state"] for job in jobs["jobs"].values()} == {"running"}
        assert len(jobs["jobs"]) == len(events["events"]) == 7
    assert (facts["sites"], facts["jobs_per_site"], facts["simulated"]) == (2, 7, True)
    assert all(0 < facts[name]["min"] <= facts[name]["max"] < 60 for name in FIGURES)
    assert facts["bare_parse_cpu_seconds"]["max"] < facts["controller_cpu_seconds"]["max"]
    assert "2 simulated sites with 7 jobs each" in " ".join(drawn(watch_table(facts)).split())


def test_the_path_is_as_before(tmp_path: Path) -> None:
    before = os.environ["PATH"]
    with _programs(tmp_path / "bin"):
        assert os.environ["PATH"] != before
    assert os.environ["PATH"] == before


def test_what_is_typed_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(bench_watch, "watch", lambda *told: asked.append(told) or {"sites": told[0]})
    words = ["bench", "watch", "--sites", "3", "--jobs", "9", "--talking", "1", "--interval", "2", "--json"]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, json.loads(done.output)) == (0, {"sites": 3})
    assert asked == [(3, 9, 3, 2.0, 1)]
