"""Plans and budgets as others rely on them, and as tables that lose nothing at 120 columns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import views
from orchestrator.desk import Desk
from tests.orchestrator.story import A, B, Story, drawn, key, plan


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """An operator with two allocations of 100 core-hours."""
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path))
    monkeypatch.delenv("EUROTRAIN_DATABASE", raising=False)
    desk = Desk.open()
    for allocation in ("demo-a", "demo-b"):
        desk.ledger.grant(allocation, 100_000_000, "core-hour", "first")
    yield desk
    desk.store.close()


def log(desk: Desk, story: Story, run: str) -> None:
    """The controller's own events of a story, into the log of a run."""
    for event in story.events:
        if not event.site:
            desk.store.record(run, event.kind, **event.facts)


def cells(text: str) -> list[list[str]]:
    """The cells of a table's lines."""
    lines = text.replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


# ---- budgets


def budget(desk: Desk) -> dict[str, dict[str, Any]]:
    return {row["allocation"]: row for row in views.budget(desk)}


def test_a_budget_that_nothing_has_drawn_on(desk: Desk) -> None:
    row = budget(desk)["demo-a"]
    assert 0 <= row.pop("age_seconds") < 60
    assert row == {
        "allocation": "demo-a",
        "unit": "core-hour",
        "granted": 100.0,
        "settled": 0.0,
        "burning": 0.0,
        "committed": 0.0,
        "available": 100.0,
    }


def test_a_running_segment_burns_what_its_ranks_cost_by_the_hour(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, each a core-hour per hour, for six minutes: 0.2 of the core-hour that is reserved."""
    story = Story().intend(A, B).job(A, "running", started=1000.0).job(B, "pending")
    log(desk, story, "run")
    desk.ledger.reserve("demo-a", key(A), 1_000_000)
    desk.ledger.reserve("demo-b", key(B), 1_000_000)
    monkeypatch.setattr(time, "time", lambda: 1360.0)
    a, b = budget(desk)["demo-a"], budget(desk)["demo-b"]
    assert (a["burning"], a["committed"], a["available"]) == (0.2, 0.8, 99.0)
    assert (b["burning"], b["committed"], b["available"]) == (0.0, 1.0, 99.0)


def test_segments_of_all_runs_burn_together(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("one", "two"):
        story = Story()
        story.intend(A).events[-1].facts["key"] = f"{run}.key"
        story.job(A, "running", started=1000.0).events[-1].facts["key"] = f"{run}.key"
        log(desk, story, run)
    monkeypatch.setattr(time, "time", lambda: 1360.0)
    assert budget(desk)["demo-a"]["burning"] == 0.4


@pytest.mark.parametrize("end", ["ended", "settled"])
def test_what_has_ended_burns_no_more(desk: Desk, end: str) -> None:
    story = Story().intend(A).job(A, "running", started=1000.0)
    if end == "ended":
        story.job(A, "ended", started=1000.0)
    else:
        story.settle(A)
    log(desk, story, "run")
    assert budget(desk)["demo-a"]["burning"] == 0.0


def test_a_clock_behind_the_site_s_burns_nothing_back(desk: Desk) -> None:
    log(desk, Story().intend(A).job(A, "running", started=time.time() + 3600.0), "run")
    assert budget(desk)["demo-a"]["burning"] == 0.0


def test_a_job_without_a_known_start_burns_nothing(desk: Desk) -> None:
    log(desk, Story().intend(A).job(A, "running", started=0.0), "run")
    assert budget(desk)["demo-a"]["burning"] == 0.0


def test_the_table_of_budgets(desk: Desk) -> None:
    desk.ledger.reserve("demo-a", "x", 1_234_567)
    text = drawn(views.budget_table(views.budget(desk)))
    assert cells(text) == [
        ["allocation", "unit", "granted", "settled", "burning", "committed", "available"],
        ["demo-a", "core-hour", "100.000", "0.000", "0.000", "1.235", "98.765"],
        ["demo-b", "core-hour", "100.000", "0.000", "0.000", "0.000", "100.000"],
    ]
    assert "burning: estimated" in text


# ---- plans


def test_the_table_of_a_plan() -> None:
    given = {
        "estimated_memory_per_rank_bytes": 3 << 30,
        "estimated_seconds": 5400.0,
        "estimated_units": 3_000_000,
        "reserved": 4_250_000,
    }
    islands = [{**island, **given} for island in plan()["islands"]]
    text = drawn(views.plan_table({**plan(), "islands": islands}))
    assert (
        text.splitlines()[0].strip() == f"trial: {plan()['parameters'] / 1e3:.0f}k parameters, 10.2k tokens"
    )
    assert cells(text) == [
        ["site", "layout", "nodes", "ranks", "steps", "memory/rank", "expected", "reserved", "allocation"],
        [A, "TP2", "1", "2", "40", "~3 GiB", "~1h30min, ~3 core-hours", "4.25 core-hours", "demo-a"],
        [B, "PP2", "1", "2", "40", "~3 GiB", "~1h30min, ~3 core-hours", "4.25 core-hours", "demo-b"],
    ]


def test_an_island_of_one_rank_says_so() -> None:
    island = {**plan()["islands"][0], "layout": {"tp": 1, "pp": 1}, "ranks": 1}
    text = drawn(views.plan_table({**plan(), "islands": [island]}))
    assert cells(text)[1][1:3] == ["1 rank", "1"]


def test_the_reasons_of_a_plan_name_their_island() -> None:
    reasons = views.plan_reasons(plan())
    assert reasons[0] == "~ is an estimate"
    assert reasons[1 : 1 + len(plan()["reasons"])] == plan()["reasons"]
    assert f"{A}: {plan()['islands'][0]['reasons'][0]}" in reasons
    assert f"{B}: {plan()['islands'][1]['reasons'][-1]}" == reasons[-1]
