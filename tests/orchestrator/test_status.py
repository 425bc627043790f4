"""What each island does now, as others rely on it and as people read it."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.status import status, table
from parallelism.layout import Layout
from tests.orchestrator.story import BATCH_TOKENS, CREATED, RUN, STEPS, A, B, Story, drawn, key

HEADS = ("site", "ranks", "step", "loss", "tokens/s", "checkpoint", "round", "restarts", "job", "now")


def at_work() -> Story:
    """A trains, B has lost a rank."""
    story = Story().start(A, B).train(A, 1, 4, seconds=0.5).train(B, 1, 2, seconds=0.25)
    story.add(site_kinds.CHECKPOINT_SAVED, at=A, step=4)
    story.add(site_kinds.ROUND_APPLIED, at=A, round=1)
    story.contribute(A).close(A)
    story.add(site_kinds.RANK_DIED, at=B)
    return story


def test_the_keys_that_status_has() -> None:
    facts = status(at_work().state, None)
    assert list(facts) == [
        "run", "outcome", "reason", "stop_requested", "coordinator", "age_seconds", "tokens",
        "tokens_planned", "tokens_per_second", "rounds", "drift", "updates_refused", "islands", "alerts",
    ]  # fmt: skip


def test_a_run_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: CREATED + 90.04)
    facts = status(at_work().state, "host/boot/1/2")
    a, b = facts.pop("islands")
    assert facts == {
        "run": RUN,
        "outcome": None,
        "reason": "",
        "stop_requested": False,
        "coordinator": "host/boot/1/2",
        "age_seconds": 90.0,
        "tokens": 6 * BATCH_TOKENS,
        "tokens_planned": 2 * STEPS * BATCH_TOKENS,
        "tokens_per_second": BATCH_TOKENS * (2 + 4),
        "rounds": 1,
        "drift": None,
        "updates_refused": [],
        "alerts": [],
    }
    assert a == {
        "site": A,
        "layout": asdict(Layout(tp=2)),
        "ranks": 2,
        "activity": "waiting for round 1",
        "step": 4,
        "steps": STEPS,
        "loss": 6.6,
        "tokens_per_second": BATCH_TOKENS * 2,
        "checkpoint_step": 4,
        "round": 1,
        "restarts": 0,
        "segment": key(A),
        "job_id": "70",
        "job_state": "running",
        "pids": {0: 81, 1: 82},
        "held": "",
        "windows": [],
        "excluded": [],
    }
    assert (b["activity"], b["pids"]) == ("replacing its ranks: rank 1 died", {})


def test_what_rounds_came_to() -> None:
    apart = {"value": 2e-15, "tensor": "w", "sites": [A, B]}
    story = at_work().contribute(A, B, number=2).collect(A, number=2)
    story.add(kinds.UPDATE_REFUSED, number=2, site=B, reason="it is not finite", discarded=True)
    story.close(A, missing=(B,), drift=apart)
    facts = status(story.state, "someone")
    assert facts["drift"] == apart
    assert facts["updates_refused"] == [{"round": 2, "site": B, "reason": "it is not finite"}]
    assert "2 rounds closed, bases 2e-15 apart" in drawn(table(facts), 200)
    assert "bases equal" in drawn(table({**facts, "drift": {**apart, "value": 0.0}}), 200)
    assert "bases" not in drawn(table({**facts, "drift": None}), 200)
    assert "update of round 2 refused: it is not finite" in drawn(table(facts), 200)
    assert story.contribute(A, number=3).close(A).state.drift == apart  # one island alone tells nothing new


def test_a_run_before_its_first_segment() -> None:
    island = status(Story().state, None)["islands"][0]
    assert {name: island[name] for name in ("segment", "job_id", "job_state", "loss", "checkpoint_step")} == {
        "segment": None, "job_id": None, "job_state": None, "loss": None, "checkpoint_step": None,
    }  # fmt: skip
    assert island["activity"] == "waiting for its first segment"


def test_a_segment_that_its_site_has_not_confirmed_has_no_job() -> None:
    island = status(Story().intend(A).state, None)["islands"][0]
    assert (island["segment"], island["job_id"], island["job_state"]) == (key(A), None, "intended")


def test_an_ended_run_has_an_age_that_stands_and_islands_that_rest() -> None:
    story = at_work().end(A).settle(A)
    story.add(kinds.RUN_ENDED, outcome="stopped", reason="an operator asked for it")
    facts = status(story.state, None)
    assert facts["age_seconds"] == story.clock - CREATED
    assert [i["activity"] for i in facts["islands"]] == ["completed", "stopped"]
    mean = story.state.islands[A].mean_tokens_per_second
    assert facts["islands"][0]["tokens_per_second"] == mean != story.state.islands[A].tokens_per_second
    assert (facts["outcome"], facts["reason"]) == ("stopped", "an operator asked for it")


def rows(story: Story, coordinator: str | None = "someone") -> list[list[str]]:
    """The table's cells, its heads first, on a terminal of 120 columns; lines of a cell joined again."""
    lines = drawn(table(status(story.state, coordinator)), 120).replace("┃", "│").splitlines()
    found: list[list[str]] = []
    for cells in ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line):
        if cells[0]:
            found.append(cells)
        else:
            found[-1] = [f"{above} {below}".strip() for above, below in zip(found[-1], cells, strict=True)]
    return found


def test_the_table_of_a_run_at_work() -> None:
    heads, a, b = rows(at_work())
    assert tuple(heads) == HEADS
    assert a == [A, "2", "4/40", "6.6000", "256", "4", "1", "0", "70 running", "waiting for round 1"]
    assert b == [
        B,
        "2",
        "2/40",
        "6.8000",
        "512",
        "-",
        "0",
        "0",
        "70 running",
        "replacing its ranks: rank 1 died",
    ]


def test_the_table_before_any_step_has_all_its_columns() -> None:
    heads, a, _ = rows(Story())
    assert tuple(heads) == HEADS
    assert a == [A, "2", "0/40", "-", "-", "-", "0", "0", "-", "waiting for its first segment"]


def test_the_head_tells_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: CREATED + 90.0)
    text = drawn(table(status(at_work().state, "someone")), 120)
    head = f"{RUN}: running, 1min30s; 768 of 10.2k tokens (8 %), 768 tokens/s, 1 rounds closed"
    assert " ".join(text.split("┏")[0].split()) == head


def test_a_run_that_has_trained_all_its_tokens_is_at_one_hundred_percent() -> None:
    story = Story().start(A, B).train(A, STEPS, STEPS).train(B, STEPS, STEPS)
    assert "10.2k of 10.2k tokens (100 %)" in " ".join(
        drawn(table(status(story.state, "someone")), 120).split()
    )


def test_a_run_without_a_plan_of_tokens_has_made_no_progress() -> None:
    assert "(0 %)" in drawn(table(status(Story(tokens=0).state, "someone")), 120)


@pytest.mark.parametrize(
    ("coordinator", "ended", "said"), [(None, False, True), ("someone", False, False), (None, True, False)]
)
def test_a_run_that_nobody_coordinates_says_what_to_do(
    coordinator: str | None, ended: bool, said: bool
) -> None:
    story = at_work()
    if ended:
        story.add(kinds.RUN_ENDED)
    text = drawn(table(status(story.state, coordinator)), 120)
    assert (f"nobody coordinates this run: eurotrain resume {RUN}" in text) is said


def test_the_last_alerts_and_the_reason_stand_below() -> None:
    story = Story()
    for number in range(7):
        story.add(kinds.ALERT, text=f"alert {number}")
    story.add(kinds.RUN_ENDED, outcome="failed", reason="all is lost")
    text = drawn(table(status(story.state, None)), 120)
    assert [f"! alert {n}" in text for n in range(7)] == [False, False, True, True, True, True, True]
    last = [line.strip() for line in text.rstrip().splitlines()[-3:]]
    assert last == ["! alert 5", "! alert 6", "all is lost"]
