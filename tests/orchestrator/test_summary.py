"""What a run came to: the keys that others rely on, and the table."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.summary import summarise, table, write_summary
from parallelism.layout import Layout
from tests.orchestrator.story import BATCH_TOKENS, RUN, A, B, Story, drawn


def finished() -> Story:
    """Two islands, two rounds, one recovery of 3 seconds, a second segment at A."""
    story = Story().start(A, B).train(A, 1, 2, seconds=0.5, loss=8.0).train(B, 1, 4, seconds=0.25, loss=6.0)
    story.add(site_kinds.RANK_DIED, at=A)
    story.add(site_kinds.RANKS_STARTED, at=A, generation=2)
    story.clock += 1.0
    story.train(A, 1, 4, loss=5.0)
    for number in (1, 2):
        story.contribute(A, B, number=number).collect(A, B, number=number)
        story.close(A, B) if number == 1 else story.close(A, missing=(B,))
        for site in (A, B):
            story.add(kinds.ROUND_DELIVERED, number=number, site=site)
    story.add(site_kinds.ROUND_APPLIED, at=B, waited_seconds=1.25)
    story.add(kinds.FAULT_INJECTED)
    story.end(A, outcome="drained").settle(A).start(A, sequence=1).train(A, 5, 5, 1, loss=4.0).end(A, 1)
    story.settle(A, 1).end(B).settle(B, amount=125_000)
    story.add(kinds.ALERT)
    story.add(kinds.RUN_ENDED)
    return story


def test_the_keys_that_the_summary_has() -> None:
    summary = summarise(finished().state)
    assert {
        "loss_first", "loss_last", "tokens", "tokens_per_second", "islands", "rounds", "bytes_exchanged",
        "unit_hours", "recovery_seconds", "wall_seconds",
    } <= summary.keys()  # fmt: skip
    for island in summary["islands"]:
        assert {"site", "layout", "ranks", "restarts"} <= island.keys()


def test_a_finished_run() -> None:
    story = finished()
    summary = summarise(story.state)
    islands = summary.pop("islands")
    assert summary == {
        "run": RUN,
        "outcome": "completed",
        "reason": "all islands trained all their steps",
        "loss_first": 7.0,  # means over the islands
        "loss_last": 5.0,
        "tokens": 9 * BATCH_TOKENS,
        "tokens_per_second": pytest.approx(sum(i["tokens_per_second"] for i in islands)),
        "rounds": 2,
        "rounds_closed_without": {"2": [B]},
        "updates_refused": 0,
        "drift": None,
        "bytes_exchanged": 4 * 500 + 4 * 700,
        "unit_hours": 0.625,
        "recovery_seconds": 3.0,
        "wall_seconds": story.clock - story.state.created,
        "faults": [{"what": "rank 1 killed", "proof": "signal 9"}],
        "alerts": ["beware"],
    }


def test_the_islands_of_a_finished_run() -> None:
    story = finished()
    steps = [e for e in story.events if e.kind == site_kinds.STEP and e.site == A]
    seconds = steps[-1].time - steps[0].time + 0.5
    a, b = summarise(story.state)["islands"]
    assert a == {
        "site": A,
        "layout": asdict(Layout(tp=2)),
        "ranks": 2,
        "restarts": 1,
        "segments": 2,
        "steps": 5,
        "loss": 4.0,
        "tokens": 5 * BATCH_TOKENS,
        "tokens_per_second": round(5 * BATCH_TOKENS / seconds, 1),
        "waited_for_rounds_seconds": 0.0,
        "recoveries_seconds": [3.0],
        "unit": "core-hour",
        "unit_hours": 0.5,
    }
    assert (b["waited_for_rounds_seconds"], b["unit_hours"], b["restarts"]) == (1.25, 0.125, 0)


def test_a_run_before_its_first_step_has_no_loss_and_no_recovery() -> None:
    summary = summarise(Story().state)
    assert (summary["loss_first"], summary["loss_last"], summary["recovery_seconds"]) == (None, None, None)
    assert (summary["tokens"], summary["tokens_per_second"], summary["unit_hours"]) == (0, 0.0, 0.0)
    assert (summary["outcome"], summary["wall_seconds"]) == (None, 0.0)


def test_the_summary_is_written_as_json(tmp_path: Path) -> None:
    state = finished().state
    write_summary(tmp_path / "runs" / RUN / "summary.json", state)
    assert json.loads((tmp_path / "runs" / RUN / "summary.json").read_text()) == summarise(state)


ROWS = (
    "layout", "ranks", "steps", "loss, first step", "loss, last step", "tokens", "tokens/s", "rounds closed",
    "bytes exchanged", "waited for rounds", "rank restarts", "recovery", "core-hour", "wall time",
)  # fmt: skip


def rows(story: Story) -> dict[str, list[str]]:
    """The table's cells by the name of their row."""
    lines = drawn(table(summarise(story.state)), 120).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return {name: rest for name, *rest in cells}


def test_the_table_of_a_finished_run() -> None:
    story = finished()
    text = drawn(table(summarise(story.state)), 120)
    assert text.splitlines()[0].strip() == f"{RUN}: completed"
    assert [word for word in text.split() if word in (A, B, "run")] == [A, B, "run"]
    found = rows(story)
    assert set(ROWS) <= found.keys()
    assert found["layout"] == ["TP2", "PP2", ""]
    assert found["ranks"] == ["2", "2", "4"]
    assert found["loss, first step"] == ["", "", "7.0000"]
    assert found["loss, last step"] == ["4.0000", "6.0000", "5.0000"]
    assert found["tokens"] == ["640", "512", "1,152"]
    assert found["bytes exchanged"] == ["", "", "4,800"]
    assert found["rank restarts"] == ["1", "0", "1"]
    assert found["recovery"] == ["3.0 s", "", "3.0 s"]
    assert found["core-hour"] == ["0.5000", "0.1250", "0.6250"]


def test_the_table_of_a_run_that_has_not_begun() -> None:
    story = Story()
    assert f"{RUN}: running" in drawn(table(summarise(story.state)), 120)
    found = rows(story)
    assert set(ROWS) <= found.keys()
    assert found["loss, last step"] == ["-", "-", "-"]
    assert found["recovery"] == ["", "", ""]
    assert found["tokens/s"] == ["0", "0", "0"]


def test_an_island_of_one_rank_has_a_layout_that_says_so() -> None:
    summary = summarise(Story().state)
    summary["islands"][0]["layout"] = asdict(Layout())
    assert "1 rank" in drawn(table(summary), 120)


def test_different_units_are_not_added_up() -> None:
    state = copy.deepcopy(finished().state)
    state.plan["islands"][1]["unit"] = "node-hour"
    summary = summarise(state)
    assert summary["unit_hours"] is None
    line = next(li for li in drawn(table(summary), 120).splitlines() if "core-hour / node-hour" in li)
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["0.5000", "0.1250", ""]
