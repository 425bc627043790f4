"""Saving beside the training: the step's values bit for bit, and no writer's end costs more than its save."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from checkpoints.attempts import candidates, survey
from checkpoints.reader import Reader, Shard
from checkpoints.saver import Saver
from tests.checkpoints.saving import (
    WIDE,
    State,
    attempt_of,
    check_all,
    order,
    problem_of,
    save,
    state_of,
    stop,
    wait_until,
)

Make = Callable[..., Saver]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Saver] = []

    def saver(writer: int = 0, patience: float = WIDE) -> Saver:
        made.append(Saver(writer, "this one", patience))
        return made[-1]

    yield saver
    for each in made:
        each.close()


def writer_of(saver: Saver) -> int:
    assert saver.pid is not None
    return saver.pid


def started(make: Make, directory: Path, state: State, **how: float) -> Saver:
    """A saver that has saved step 1."""
    saver = make(state.rank, **how)
    save(saver, directory, state, 1)
    assert [outcome.problem for outcome in saver.finish()] == [None]
    return saver


def test_what_is_saved_is_what_was_there(make: Make, tmp_path: Path) -> None:
    tensors = {
        "f32": torch.randn(300, 7),
        "bf16": torch.randn(5, 3).bfloat16(),
        "cut": torch.randn(10, 10)[2:7, 3:9],  # not contiguous
        "rng": torch.arange(255, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    shards = [Shard(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in tensors.items()]
    saver = make()
    saver.save(attempt_of(tmp_path, 7), shards, order(1, 7))
    for tensor in tensors.values():
        tensor.zero_()
    (outcome,) = saver.finish()
    assert (outcome.problem, outcome.facts) == (None, {"step": 7})
    assert outcome.bytes == sum(path.stat().st_size for path in outcome.attempt.glob("*.bin"))
    reader = Reader(outcome.attempt)
    reader.verify()
    for name, value in expected.items():
        found = torch.empty_like(value)
        reader.read(Shard(name, tuple(value.shape), (0,) * value.dim(), found))
        assert torch.equal(found, value), name


def test_training_goes_on_while_the_writer_is_slow(make: Make, tmp_path: Path) -> None:
    state = State()
    saver = started(make, tmp_path, state)
    stop(writer_of(saver))
    save(saver, tmp_path, state, 2)
    for step in range(3, 50):
        state.train(step)
    save(saver, tmp_path, state, 50)
    state.train(99)
    assert saver.watch() == []
    assert check_all(tmp_path, 1) == [1], "the writer was not slow"
    os.kill(writer_of(saver), signal.SIGCONT)
    assert [outcome.problem for outcome in saver.finish()] == [None, None]
    assert check_all(tmp_path, 1) == [50, 2, 1]


def test_a_third_save_waits(make: Make, tmp_path: Path) -> None:
    state = State()
    saver = started(make, tmp_path, state)
    stop(writer_of(saver))
    for step in (2, 3):
        save(saver, tmp_path, state, step)
    third = threading.Thread(target=save, args=(saver, tmp_path, state, 4))
    third.start()
    third.join(0.5)
    assert third.is_alive(), "it took a buffer that was still to be written"
    os.kill(writer_of(saver), signal.SIGCONT)
    third.join(60)
    saver.finish()
    assert check_all(tmp_path, 1) == [4, 3, 2, 1]


def test_the_shapes_may_change(make: Make, tmp_path: Path) -> None:
    saver = make()
    for step, size in ((1, 10), (2, 5_000_000), (3, 20)):
        saver.save(
            attempt_of(tmp_path, step), [Shard("t", (size,), (0,), torch.full((size,), step))], order(1, step)
        )
    assert [outcome.problem for outcome in (*saver.finish(),)] == [None] * 3
    for path in candidates(tmp_path):
        Reader(path).verify()  # the padding, too, which held other tensors before


def test_a_killed_writer_costs_its_save_alone(make: Make, tmp_path: Path) -> None:
    state = State()
    saver = started(make, tmp_path, state)
    first = writer_of(saver)
    stop(first)
    save(saver, tmp_path, state, 2)
    save(saver, tmp_path, state, 3)
    os.kill(first, signal.SIGKILL)
    lost, sound = saver.finish()
    assert lost.problem == "writer 0: its writer process was killed by SIGKILL"
    assert (lost.attempt, sound.problem) == (attempt_of(tmp_path, 2), None)
    assert writer_of(saver) != first
    assert state_of(first) == ""
    assert check_all(tmp_path, 1) == [3, 1]
    assert survey(tmp_path).uncommitted == [], "what was left of the lost one takes space"


def test_a_writer_that_dies_idle_costs_nothing(make: Make, tmp_path: Path) -> None:
    state = State()
    saver = started(make, tmp_path, state)
    os.kill(writer_of(saver), signal.SIGKILL)
    wait_until(lambda: state_of(writer_of(saver)) in "Z", "it lives")
    save(saver, tmp_path, state, 2)
    assert [outcome.problem for outcome in saver.finish()] == [None]


def test_a_hung_writer_is_replaced(make: Make, tmp_path: Path) -> None:
    state = State()
    saver = started(make, tmp_path, state)
    first = writer_of(saver)
    stop(first)
    save(saver, tmp_path, state, 2)
    saver.patience = 0.3
    outcomes = []
    while not outcomes:
        if writer_of(saver) != first:
            saver.patience = WIDE  # its successor is not to be hurried
        state.train(99)
        outcomes = saver.watch()
    assert problem_of(outcomes) == "writer 0: its writer process gave no sign for 0 s and was killed"
    assert state_of(first) == ""
    save(saver, tmp_path, state, 3)
    assert [outcome.problem for outcome in saver.finish()] == [None]
    assert check_all(tmp_path, 1) == [3, 1]


def test_no_space_left(make: Make, tmp_path: Path) -> None:
    """The limit on the writer's files stops a write half-way, as a full disk or a quota does."""
    state = State()
    saver = started(make, tmp_path, state)
    process = psutil.Process(writer_of(saver))
    before = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    save(saver, tmp_path, state, 2)
    assert problem_of(saver.finish()) == "writer 0: File too large"
    assert check_all(tmp_path, 1) == [1]
    assert survey(tmp_path).uncommitted == [], "what was written takes space that is needed"
    process.rlimit(resource.RLIMIT_FSIZE, before)
    save(saver, tmp_path, state, 3)
    assert [outcome.problem for outcome in saver.finish()] == [None]
    assert saver.pid == process.pid, "a full disk is no fault of the writer"
    assert check_all(tmp_path, 1) == [3, 1]


def test_a_place_that_cannot_be_written_is_told(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saver = make()
    saver.save(attempt_of(tmp_path / "file", 1), State().shards(), order(1, 1))
    assert problem_of(saver.finish()).endswith("Not a directory")


def test_facts_that_no_reader_would_accept_are_told(make: Make, tmp_path: Path) -> None:
    saver = make()
    saver.save(attempt_of(tmp_path, 1), State().shards(), order(1, -1))
    assert "a checkpoint's facts must tell its step" in problem_of(saver.finish())
    save(saver, tmp_path, State(), 2)
    assert [outcome.problem for outcome in saver.finish()] == [None]


def test_one_writer_of_two_fails(make: Make, tmp_path: Path) -> None:
    states = [State(rank, 2) for rank in range(2)]
    savers = [make(rank) for rank in range(2)]
    for saver, state in zip(savers, states, strict=True):
        save(saver, tmp_path, state, 1)
    assert [saver.finish()[0].problem for saver in savers] == [None, None]
    stop(writer_of(savers[1]))
    for saver, state in zip(savers, states, strict=True):
        save(saver, tmp_path, state, 2)
    os.kill(writer_of(savers[1]), signal.SIGKILL)
    assert problem_of(savers[1].finish()) == "its writer process was killed by SIGKILL"
    assert problem_of(savers[0].finish()) == "writer 1: its writer process was killed by SIGKILL"
    for saver, state in zip(savers, states, strict=True):
        save(saver, tmp_path, state, 3)
    assert [saver.finish()[0].problem for saver in reversed(savers)] == [None, None]
    assert check_all(tmp_path, 2) == [3, 1]


def test_a_rank_that_waits_for_the_leader_keeps_nothing_from_it(make: Make, tmp_path: Path) -> None:
    """The leader's third save waits for a part that no writer will write; the other rank, in a collective
    with the leader, does not even look after its own."""
    states, savers = [State(0, 2), State(1, 2)], [make(0), make(1)]
    for saver, state in zip(savers, states, strict=True):
        saver.prepare(state.shards())
    stop(writer_of(savers[1]))
    for step in (1, 2):
        for saver, state in zip(savers, states, strict=True):
            save(saver, tmp_path, state, step)
    os.kill(writer_of(savers[1]), signal.SIGKILL)
    save(savers[0], tmp_path, states[0], 3)
    save(savers[1], tmp_path, states[1], 3)
    assert [outcome.problem is None for outcome in savers[0].finish()] == [False, True, True]
    assert check_all(tmp_path, 2) == [3, 2]


def test_a_writer_that_cannot_be_started_is_told_of(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader does not wait for it in vain."""

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    leader, other = make(0), make(1)
    save(leader, tmp_path, State(0, 2), 1)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        save(other, tmp_path, State(1, 2), 1)
    reason = "no writer process can be started: Resource temporarily unavailable"
    assert problem_of(other.watch()) == reason
    assert problem_of(leader.finish()) == f"writer 1: {reason}"


def test_a_writer_without_a_sign_is_not_waited_for_for_ever(make: Make, tmp_path: Path) -> None:
    leader = make()
    leader.save(attempt_of(tmp_path, 1), State(0, 2).shards(), order(2, 1, patience=0.2))
    assert problem_of(leader.finish()) == "writer 1: not a sign for 0 s"
    assert candidates(tmp_path) == []


RANK = """
import sys, time
from pathlib import Path
from tests.checkpoints.saving import State, save
from checkpoints.saver import Saver
saver = Saver(0, "x")
save(saver, Path(sys.argv[1]), State(), 1)
saver.finish()
print(saver.pid, flush=True)
time.sleep(600)
"""


def test_a_writer_dies_with_its_rank(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as rank:
        assert rank.stdout
        writer = int(rank.stdout.readline())
        assert os.getpgid(writer) == os.getpgid(rank.pid), "whoever kills the rank's group would miss it"
        stop(writer)  # not even then does it stay
        rank.kill()
        rank.wait()
    wait_until(lambda: state_of(writer) in "Z", "the writer outlives its rank")
