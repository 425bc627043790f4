"""The terminal of whoever coordinates a run: what it tells, and what Ctrl-C does."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clusters import events as site_kinds
from orchestrator import console, kinds, lease
from orchestrator.console import Progress, _ctrl_c, coordinate, resume, stop
from orchestrator.desk import Desk
from orchestrator.state import Event, RunState
from tests.orchestrator.story import FACTS, RUN, A, B, Story, key, tell

ELSEWHERE = "login7.far.away/boot/123/456"

# ---- progress


def said(kind: str, *, at: str = "", **facts: Any) -> str | None:
    """What is told of an event in the middle of a run, without the time."""
    lines: list[str] = []
    story = Story().start(A, B)
    event = story.add(kind, at=at, **facts)
    Progress(lines.append)(event, story.state)
    assert len(lines) <= 1
    return lines[0].split("s  ", 1)[1] if lines else None


LINES: list[tuple[str, dict[str, Any], str]] = [
    (kinds.SEGMENT_INTENDED, {}, f"segment {key(A)}: units reserved"),
    (kinds.SEGMENT_INTENDED, {"reason": "ends early"}, f"segment {key(A)}: units reserved; ends early"),
    (kinds.SUBMISSION_HELD, {}, "the next segment waits: full"),
    (kinds.JOB_OBSERVED, {}, "job 71 running"),
    (kinds.JOB_OBSERVED, {"state": "ended", "outcome": "failed"}, "job 71 ended: failed"),
    (kinds.JOB_OBSERVED, {"state": "pending", "reason": "Priority"}, "job 71 pending"),
    (kinds.JOB_OBSERVED, {"state": "pending", "reason": "BeginTime"}, "job 71 pending: BeginTime"),
    (kinds.SEGMENT_SETTLED, {}, f"segment {key(A)} settled: 0.2500 units"),
    (kinds.NODES_EXCLUDED, {}, f"segment {key(A)} keeps away from n1"),
    (kinds.NODES_EXCLUDED, {"nodes": []}, f"segment {key(A)} keeps away from no node"),
    (kinds.NODE_TRUSTED, {}, "n1 may be used again: an operator says so"),
    (site_kinds.NODE_LOST, {}, "lost node n1: no heartbeat"),
    (kinds.ISLAND_GIVEN_UP, {}, "given up: too bad"),
    (kinds.UPDATE_REFUSED, {}, "update of round 1 refused: damaged"),
    (kinds.STOP_REQUESTED, {}, "stopping: islands checkpoint and exit (Ctrl-C again leaves them to it)"),
    (kinds.FAULT_INJECTED, {}, "fault injected: rank 1 killed"),
    (kinds.ALERT, {}, "warning: beware"),
    (site_kinds.RUNTIME_READY, {}, "Ray and imports ready after 6.2 s"),
    (site_kinds.RANKS_STARTED, {}, "ranks started, generation 0: pids [81, 82]"),
    (site_kinds.TRAINING_READY, {}, "training from step 0, fresh weights"),
    (
        site_kinds.TRAINING_READY,
        {"step": 5, "checkpoint": "/x/y/step-00000005.0001"},
        "training from step 5, checkpoint step-00000005.0001",
    ),
    (site_kinds.RANK_DIED, {}, "rank 1 (pid 82) died: signal 9"),
    (site_kinds.RANK_DIED, {"exit_code": 1, "signal": None}, "rank 1 (pid 82) died: exit code 1"),
    (site_kinds.STEP, {}, "step 1/40  loss 6.5000  256 tokens/s"),
    (site_kinds.CHECKPOINT_SAVED, {}, "checkpoint of step 5: 2.5 MB"),
    (site_kinds.CHECKPOINT_FAILED, {}, "checkpoint of step 10 not saved: writer 1: No space left on device"),
    (site_kinds.CHECKPOINT_DAMAGED, {}, "checkpoint damaged, another is used: crc32c"),
    (site_kinds.ROUND_APPLIED, {}, "round 1 applied, update norm 0.1250"),
    (site_kinds.ROUND_OPEN, {}, "round 1 not closed in time: training goes on"),
    (site_kinds.SEGMENT_DRAINING, {}, "draining: time limit"),
    (site_kinds.TRAINING_ENDED, {}, "training completed at step 40"),
    (site_kinds.SEGMENT_ENDED, {}, "segment ended: completed"),
    (
        site_kinds.SEGMENT_ENDED,
        {"outcome": "failed", "reason": "disk full"},
        "segment ended: failed, disk full",
    ),
]
SILENT = {
    kinds.RUN_CREATED, kinds.RUN_RESUMED, kinds.RUN_ENDED, kinds.SEGMENT_RELEASED, kinds.ROUND_DELIVERED,
    kinds.UPDATE_COLLECTED, kinds.SITE_LIMITS, site_kinds.SEGMENT_CLAIMED, site_kinds.ROUND_CONTRIBUTED,
}  # fmt: skip


OUTCOMES = {site_kinds.COMPLETED, site_kinds.DRAINED, site_kinds.STARVED, site_kinds.FAILED}


def constants(module: ModuleType) -> dict[str, str]:
    """Kinds of events that a module names, with what it says of their facts."""
    pattern = re.compile(r'^[A-Z_]+ = "([a-z_.]+)"(?:  # (.*))?$', re.MULTILINE)
    found = dict(pattern.findall(inspect.getsource(module)))
    return {kind: facts for kind, facts in found.items() if kind not in OUTCOMES | {site_kinds.GARBLED}}


KINDS = constants(kinds) | constants(site_kinds)


@pytest.mark.parametrize(("kind", "facts", "line"), LINES)
def test_a_line_for_each_kind(kind: str, facts: dict[str, Any], line: str) -> None:
    at = A if kind in constants(site_kinds) else ""
    assert said(kind, at=at, **facts) == f"{A if at or 'site' in FACTS[kind] else 'run':<10}  {line}"


def test_every_kind_is_told_or_known_to_be_silent() -> None:
    told = {kind for kind, _, _ in LINES} | {kinds.ROUND_CLOSED}
    assert told | SILENT == KINDS.keys()
    assert told & SILENT == set()
    for kind in SILENT - {kinds.RUN_CREATED}:
        assert said(kind, at=A if kind in constants(site_kinds) else "") is None


@pytest.mark.parametrize("kind", sorted(FACTS))
def test_the_examples_here_have_the_facts_that_are_documented(kind: str) -> None:
    """So a line that needs a fact which nobody promises fails above."""
    documented = set(re.findall(r"\w+", KINDS[kind]))
    from_the_agent = {"state", "job_id", "submitted", "started", "heartbeat_age"}
    facts = set(FACTS[kind]) - (from_the_agent if kind == kinds.JOB_OBSERVED else set())
    assert facts - documented <= {"proof"}


def test_no_two_kinds_share_a_name() -> None:
    named = [value for name, value in (*vars(kinds).items(), *vars(site_kinds).items()) if name.isupper()]
    assert sorted(v for v in named if isinstance(v, str)) == sorted({*KINDS, *OUTCOMES, site_kinds.GARBLED})


def test_every_line_begins_with_the_seconds_since_the_run_was_created() -> None:
    lines: list[str] = []
    story = Story()
    story.clock += 99.25
    event = story.add(kinds.ALERT)
    Progress(lines.append)(event, story.state)
    assert lines == ["  100.2s  run         warning: beware"]


@pytest.mark.parametrize(("step", "told"), [(1, True), (2, False), (9, False), (10, True), (40, True)])
def test_steps_are_told_now_and_then(step: int, told: bool) -> None:
    assert (said(site_kinds.STEP, at=A, step=step) is not None) is told


def test_a_closed_round_names_those_it_was_closed_without() -> None:
    lines: list[str] = []
    story = Story().start(A, B).contribute(A, B).close(A, B).contribute(A, number=2)
    story.close(A, missing=(B,), reset_from=A)
    for number, event in enumerate(story.events, 1):
        if event.kind == kinds.ROUND_CLOSED:
            told = Story()
            told.events = story.events[:number]
            Progress(lines.append)(event, told.state)
    assert [line.split("run         ")[1] for line in lines] == [
        "round 1 closed",
        f"round 2 closed without {B}; in the next all take the base of {A}",
    ]


# ---- Ctrl-C


def test_the_first_ctrl_c_asks_for_a_stop() -> None:
    asked: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with _ctrl_c(lambda: asked.append("stop")):
        assert asked == []
        signal.raise_signal(signal.SIGINT)
        assert asked == ["stop"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_itself_again_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="bad luck"), _ctrl_c(lambda: None):
        raise OSError("bad luck")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_leaves_at_once_though_a_thread_still_waits() -> None:
    code = (
        "import signal, threading, time; from orchestrator.console import _ctrl_c\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "with _ctrl_c(lambda: print('stop', flush=True)):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "print('never')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (130, "stop\n")
    assert done.stderr == "left running: eurotrain resume takes them up again, eurotrain stop ends them\n"


# ---- coordinating


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path))
    monkeypatch.delenv("EUROTRAIN_DATABASE", raising=False)
    monkeypatch.setattr(console, "_STOP_POLL_SECONDS", 0.01)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.01)
    desk = Desk.open()
    sites = (f'[{site}]\ncatalogue = "local"\nscratch = "{tmp_path / site}"\n' for site in (A, B))
    desk.home.sites.write_text("".join(sites))
    yield desk
    desk.store.close()


def trained() -> Story:
    """All is done, and the coordinator was killed before it could say so."""
    return Story().start(A, B).train(A, 1, 4).train(B, 1, 4).end(A).settle(A).end(B).settle(B)


def kinds_logged(desk: Desk) -> list[str]:
    return [event.kind for event in desk.store.events(RUN)]


def test_coordinating_tells_all_and_ends_with_the_table_and_the_summary(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(desk.store, trained())
    heard: list[tuple[str, str | None]] = []

    def also(event: Event, state: RunState) -> None:
        heard.append((event.kind, state.outcome))

    assert coordinate(desk, RUN, also) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("step 1/40  loss 6.9000  256 tokens/s") for line in lines)
    assert f"{RUN}: completed" in [line.strip() for line in lines]
    assert any(A in line and B in line and "run" in line for line in lines)
    assert max(map(len, lines)) <= 120
    assert lines[-2] == "completed: all islands trained all their steps"
    summary = desk.home.run(RUN).summary
    assert lines[-1] == f"summary: {summary}"
    assert json.loads(summary.read_text())["tokens"] == 2 * 4 * 128
    assert heard[0] == (kinds.RUN_CREATED, None)
    assert heard[-1] == (kinds.RUN_ENDED, "completed")
    assert desk.store.holder(RUN) is None


@pytest.mark.parametrize(("outcome", "code"), [("completed", 0), ("stopped", 0), ("failed", 1)])
def test_the_exit_code_is_that_of_the_outcome(desk: Desk, outcome: str, code: int) -> None:
    story = trained()
    story.add(kinds.RUN_ENDED, outcome=outcome)
    tell(desk.store, story)
    assert coordinate(desk, RUN) == code


def test_ctrl_c_while_coordinating_stops_the_run(desk: Desk) -> None:
    tell(desk.store, Story())

    def also(event: Event, state: RunState) -> None:
        if event.kind == kinds.RUN_CREATED:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert coordinate(desk, RUN, also) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert kinds_logged(desk) == [kinds.RUN_CREATED, kinds.STOP_REQUESTED, kinds.RUN_ENDED]
    assert desk.state(RUN).outcome == "stopped"


def test_a_coordinator_that_lost_its_lease_does_nothing_more(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(desk.store, Story())

    def also(event: Event, state: RunState) -> None:
        """Another machine takes over, as after a long pause of this one."""
        desk.store.release(RUN, lease.identity())
        desk.store.acquire(RUN, ELSEWHERE, 60.0)
        monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)

    assert coordinate(desk, RUN, also) == 1
    assert capsys.readouterr().err == f"eurotrain: {RUN} is coordinated by {ELSEWHERE} now\n"
    assert kinds_logged(desk) == [kinds.RUN_CREATED]
    assert desk.store.holder(RUN) == ELSEWHERE


def test_a_run_that_another_coordinates_is_one_clear_line(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.02)
    tell(desk.store, Story())
    desk.store.acquire(RUN, ELSEWHERE, 60.0)
    with pytest.raises(ValueError, match=f"{RUN} is coordinated by {ELSEWHERE}; stop that one first"):
        coordinate(desk, RUN)
    assert capsys.readouterr().out == f"waiting for {ELSEWHERE} to let go of {RUN}\n"


def test_a_failed_start_gives_the_lease_back(desk: Desk) -> None:
    tell(desk.store, Story())
    desk.home.sites.write_text("")
    with pytest.raises(ValueError, match=r"sites\.toml"):
        coordinate(desk, RUN)
    assert desk.store.holder(RUN) is None


# ---- resume and stop


def test_resuming_goes_on_where_the_log_ends(desk: Desk) -> None:
    tell(desk.store, trained())
    assert resume(desk, RUN) == 0
    logged = desk.store.events(RUN)
    assert [event.kind for event in logged[-2:]] == [kinds.RUN_RESUMED, kinds.RUN_ENDED]
    assert logged[-2].facts == {"holder": lease.identity()}
    assert desk.state(RUN).outcome == "completed"


def test_resuming_a_completed_run_says_where_its_summary_is(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    story = trained()
    story.add(kinds.RUN_ENDED)
    tell(desk.store, story)
    assert resume(desk, RUN) == 0
    assert capsys.readouterr().out == f"{RUN} has completed; its summary: {desk.home.run(RUN).summary}\n"
    assert kinds_logged(desk)[-1] == kinds.RUN_ENDED


def test_stopping_a_run_that_nobody_coordinates_ends_it_here(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(desk.store, Story())
    assert stop(desk, RUN) == 0
    assert kinds_logged(desk) == [kinds.RUN_CREATED, kinds.STOP_REQUESTED, kinds.RUN_ENDED]
    out = capsys.readouterr().out
    assert out.startswith(f"{RUN}: its islands checkpoint and exit\n")
    assert "stopped: an operator asked for it" in out


def test_stopping_waits_for_the_coordinator_at_work(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    tell(desk.store, Story())
    desk.store.acquire(RUN, ELSEWHERE, 60.0)
    facts = {"outcome": "stopped", "reason": "an operator asked for it"}
    coordinator = threading.Timer(0.3, lambda: desk.store.record(RUN, kinds.RUN_ENDED, **facts))
    coordinator.start()
    assert stop(desk, RUN) == 0
    coordinator.join()
    assert capsys.readouterr().out.splitlines() == [
        f"{RUN}: its islands checkpoint and exit",
        f"{RUN} has ended: stopped, an operator asked for it",
    ]
    assert desk.store.holder(RUN) == ELSEWHERE


def test_stopping_takes_over_when_the_coordinator_dies(desk: Desk) -> None:
    tell(desk.store, Story())
    desk.store.acquire(RUN, ELSEWHERE, 60.0)
    death = threading.Timer(0.2, lambda: desk.store.release(RUN, ELSEWHERE))
    death.start()
    assert stop(desk, RUN) == 0
    death.join()
    assert desk.state(RUN).outcome == "stopped"


def test_stopping_an_ended_run_asks_for_nothing(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    story = trained()
    story.add(kinds.RUN_ENDED)
    tell(desk.store, story)
    assert stop(desk, RUN) == 0
    assert capsys.readouterr().out == f"{RUN} has ended: completed, all islands trained all their steps\n"
    assert kinds_logged(desk)[-1] == kinds.RUN_ENDED
