from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from clusters import events
from orchestrator.supervisor import EXIT_CLAIMED
from tests.orchestrator.segments import RunningSegment, wait_until

Make = Callable[..., RunningSegment]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Segments that leave nothing behind, however they ended."""
    made: list[RunningSegment] = []

    def one(**fields: Any) -> RunningSegment:
        made.append(RunningSegment(tmp_path / f"segment-{len(made)}", **fields))
        return made[-1]

    yield one
    for segment in made:
        segment.clean_up()


def oldest(segment: RunningSegment, words: str) -> psutil.Process:
    """The segment's first process with these words in its command line."""
    found = [p for p in segment.leftovers.processes() if words in " ".join(p.cmdline())]
    return min(found, key=lambda p: p.create_time())


def rank_environment(segment: RunningSegment, generation: int, rank: int) -> dict[str, str]:
    path = segment.paths.root / f"env.{generation}.{rank}"
    wait_until(lambda: path.exists() and path.stat().st_size, 5, str(path))
    found: dict[str, str] = json.loads(path.read_text())
    return found


def test_a_second_claimant_exits_and_touches_nothing(make: Make) -> None:
    segment = make()
    segment.paths.claim.write_text('{"pid": 1, "host": "elsewhere", "runtime": "/tmp/et-elsewhere"}')
    assert segment.supervise().wait(20) == EXIT_CLAIMED
    assert "segment demo-local-a-0-0 is claimed already: " in segment.logs
    assert '"host": "elsewhere"' in segment.logs
    assert not segment.paths.events.exists()
    assert not segment.paths.exit.exists()


def test_a_bad_segment_gets_one_clear_line(make: Make) -> None:
    segment = make()
    segment.paths.segment.write_text('{"key": "x"}')
    process = segment.supervise(guarded=False)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 1
    assert message == f"{segment.paths.segment}: not a segment of this version of eurotrain: 'data'\n"


def test_what_is_stopped_before_it_starts_starts_nothing(make: Make) -> None:
    segment = make()
    segment.paths.stop.touch()
    assert segment.supervise().wait(20) == 0
    assert [event["kind"] for event in segment.events()] == [
        events.SEGMENT_CLAIMED,
        events.SEGMENT_DRAINING,
        events.SEGMENT_ENDED,
    ]
    assert segment.events()[-1]["outcome"] == events.DRAINED
    assert segment.events()[-1]["reason"] == "stop requested"


@pytest.mark.ray
def test_a_segment_runs_to_its_end(make: Make) -> None:
    segment = make(units_per_hour=3600.0, unit_cap=1000.0)
    process = segment.supervise(CUDA_VISIBLE_DEVICES="5,3")
    started = segment.wait_for(events.RANKS_STARTED)
    assert started["generation"] == 1
    for rank in range(2):
        env = rank_environment(segment, 1, rank)
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert env["CUDA_VISIBLE_DEVICES"] == "5,3"
        assert not [name for name in env if name.startswith("RAY_")], "the token is no rank's business"
        assert psutil.Process(started["pids"][rank]).environ()["EUROTRAIN_RUNTIME"].startswith("/tmp/et-")
    beats = {
        json.loads(segment.paths.heartbeat.read_text())["time"] for _ in range(12) if not time.sleep(0.2)
    }
    assert 2 <= len(beats) <= 4
    (segment.paths.root / "end.0").touch()
    assert process.wait(10) == 0
    told = segment.events()
    assert [event["kind"] for event in told] == [
        events.SEGMENT_CLAIMED,
        events.RUNTIME_READY,
        events.RANKS_STARTED,
        events.SEGMENT_ENDED,
    ]
    assert told[0]["incarnation"]["pid"] == told[0]["pid"]
    assert told[-1]["outcome"] == events.COMPLETED
    record = segment.record
    assert record["outcome"] == "completed"
    assert told[-1]["units"] == pytest.approx(record["end"] - record["start"], abs=1.5)
    assert "rank 1 of 2 in generation 1" in (segment.paths.logs / "rank-0001.log").read_text()


@pytest.mark.ray
def test_whatever_dies_all_ranks_are_replaced(make: Make) -> None:
    segment = make()
    process = segment.supervise()

    def victim(generation: int) -> psutil.Process:
        by_generation = [
            lambda: psutil.Process(segment.events(events.RANKS_STARTED)[0]["pids"][1]),
            lambda: oldest(segment, "parallelism.nursery"),
            lambda: oldest(segment, "ray::Slot"),
        ]
        return by_generation[generation - 1]()

    for generation in (1, 2, 3):
        before = segment.wait_for(events.RANKS_STARTED, generation)
        rank_environment(segment, generation, 0), rank_environment(segment, generation, 1)
        killed = time.time()
        victim(generation).kill()
        died = segment.wait_for(events.RANK_DIED, generation)
        assert died["time"] - killed < 0.5
        assert died["generation"] == generation
        assert died["pid"] in before["pids"]
        after = segment.wait_for(events.RANKS_STARTED, generation + 1)
        assert after["time"] - killed < 5
        assert not [pid for pid in before["pids"] if psutil.pid_exists(pid)]
        assert rank_environment(segment, generation + 1, 0)["EUROTRAIN_GENERATION"] == str(generation + 1)
    ports = {rank_environment(segment, generation, 0)["MASTER_PORT"] for generation in (1, 2, 3, 4)}
    assert len(ports) > 1
    first, second, third = segment.events(events.RANK_DIED)
    assert (first["rank"], first["signal"], first["exit_code"]) == (1, signal.SIGKILL, None)
    assert second["note"] == "was lost: its nursery died"
    assert third["note"].startswith("was lost: ")
    (segment.paths.root / "end.81").touch()
    assert process.wait(10) == 0
    assert segment.events(events.SEGMENT_ENDED)[0]["outcome"] == events.STARVED


@pytest.mark.ray
def test_replacements_without_a_checkpoint_come_to_an_end(make: Make) -> None:
    segment = make(max_restarts=1)
    process = segment.supervise()
    first = segment.wait_for(events.RANKS_STARTED)
    psutil.Process(first["pids"][1]).kill()
    second = segment.wait_for(events.RANKS_STARTED, 2)
    (segment.paths.root / "save").touch()
    wait_until(lambda: not (segment.paths.root / "save").exists(), 5, "the checkpoint")
    psutil.Process(second["pids"][1]).kill()
    segment.wait_for(events.RANKS_STARTED, 3)
    (segment.paths.root / "crash").touch()
    assert process.wait(20) == 1
    ended = segment.events(events.SEGMENT_ENDED)[0]
    assert ended["outcome"] == events.FAILED
    assert (
        "ended with exit code 1; 1 replacements saved no checkpoint; rank-0000.log ends: " in ended["reason"]
    )
    assert ended["reason"].endswith("RuntimeError: told to crash")
    assert len(segment.events(events.RANKS_STARTED)) == 3


@pytest.mark.ray
def test_bad_input_ends_a_segment_at_once(make: Make) -> None:
    segment = make(max_restarts=3)
    assert segment.supervise("choosy").wait(40) == 1
    assert len(segment.events(events.RANKS_STARTED)) == 1
    (ended,) = segment.events(events.SEGMENT_ENDED)
    assert (ended["outcome"], ended["final"]) == (events.FAILED, True)
    assert ended["reason"] == "rank 1: data/text: token 7 is none of 5"


@pytest.mark.ray
@pytest.mark.parametrize("victim", ["supervisor", "guard"])
def test_if_its_owner_is_killed_nothing_is_left(make: Make, victim: str) -> None:
    segment = make()
    process = segment.supervise("deaf")
    segment.wait_for(events.RANKS_STARTED)
    assert len(segment.leftovers.note()) >= 10
    assert segment.leftovers.ports
    if victim == "guard":
        process.kill()
    else:
        psutil.Process(segment.events(events.SEGMENT_CLAIMED)[0]["pid"]).kill()
    assert segment.leftovers.assert_none(within=5) < 5
    assert segment.record["outcome"] == "failed"
    assert segment.record["exit_code"] == 128 + 9


@pytest.mark.ray
@pytest.mark.parametrize("request_", ["Ctrl-C", "stop", "time limit"])
def test_a_drain_lets_the_ranks_save(make: Make, request_: str) -> None:
    limit = {"time_limit_seconds": 17.0} if request_ == "time limit" else {}
    segment = make(**limit)
    process = segment.supervise()
    if request_ != "time limit":  # on a busy machine it may come before the ranks
        segment.wait_for(events.RANKS_STARTED)
    if request_ == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif request_ == "stop":
        segment.paths.stop.touch()
    assert process.wait(40) == 0
    reasons = {"Ctrl-C": "signal received", "stop": "stop requested", "time limit": "time limit of 17 s"}
    assert segment.events(events.SEGMENT_DRAINING)[0]["reason"] == reasons[request_]
    ended = segment.events(events.SEGMENT_ENDED)[0]
    assert (ended["outcome"], ended["reason"]) == (events.DRAINED, reasons[request_])
    assert segment.record["outcome"] == ("cancelled" if request_ == "Ctrl-C" else "completed")
    assert segment.record["end"] - segment.record["start"] < 17


@pytest.mark.ray
@pytest.mark.parametrize("seconds", [0.2, 1.2])
def test_a_signal_while_ray_starts_is_a_drain_too(make: Make, seconds: float) -> None:
    segment = make()
    process = segment.supervise()
    segment.wait_for(events.SEGMENT_CLAIMED)
    time.sleep(seconds)
    segment.leftovers.note()
    process.terminate()
    assert process.wait(40) == 0
    told = [event["kind"] for event in segment.events()]
    assert told[-2:] == [events.SEGMENT_DRAINING, events.SEGMENT_ENDED]
    assert segment.events()[-1]["outcome"] == events.DRAINED


@pytest.mark.ray
def test_ranks_that_do_not_drain_are_killed(make: Make) -> None:
    segment = make(drain_seconds=2.0)
    process = segment.supervise("deaf")
    segment.wait_for(events.RANKS_STARTED)
    segment.paths.stop.touch()
    assert process.wait(20) == 1
    ended = segment.events(events.SEGMENT_ENDED)[0]
    assert ended["outcome"] == events.FAILED
    assert ended["reason"] == "ranks did not save and end within 2 s (stop requested)"
    assert 2 <= ended["time"] - segment.events(events.SEGMENT_DRAINING)[0]["time"] < 5
