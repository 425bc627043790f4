"""State to save, and what must be true of it when it is read back: for tests of saving."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoints.attempts import Retention, attempt_path, candidates, survey
from checkpoints.reader import Reader, Shard
from checkpoints.saver import Outcome, Saver
from checkpoints.writer import Commit

ROWS = 1 << 18  # of each of two fp32 tensors: 1 MiB
WIDE = 600.0  # seconds: patience that no slow machine outlasts


class State:
    """A rank's tensors, which training changes in place: all elements are the step's number."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.rank, self.ranks = rank, ranks
        self.tensors = {"w": torch.zeros(ROWS), "m": torch.zeros(ROWS)}

    def train(self, step: int) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(float(step))

    def shards(self) -> list[Shard]:
        whole, offset = (self.ranks * ROWS,), (self.rank * ROWS,)
        return [Shard(name, whole, offset, tensor) for name, tensor in self.tensors.items()]


def order(ranks: int, step: int, keep: int = 100, patience: float = WIDE) -> Commit:
    return Commit(ranks, {"step": step}, patience, Retention(keep))


def attempt_of(directory: Path, step: int, number: int = 1) -> Path:
    return attempt_path(directory, f"step-{step:08d}", number)


def save(saver: Saver, directory: Path, state: State, step: int, *, number: int = 1) -> float:
    """What a rank does after a step; rank 0 leads."""
    state.train(step)
    lead = order(state.ranks, step) if state.rank == 0 else None
    return saver.save(attempt_of(directory, step, number), state.shards(), lead)


def check_all(directory: Path, ranks: int) -> list[int]:
    """The steps of what counts, newest first, after every byte of it has been read: each of one step."""
    steps = []
    for path in candidates(directory):
        reader = Reader(path)
        reader.verify()
        for name in ("w", "m"):
            found = torch.full((ranks * ROWS,), -1.0)
            reader.read(Shard(name, (ranks * ROWS,), (0,), found))
            assert bool((found == reader.facts["step"]).all()), f"{path}: a mix of two steps"
        steps.append(int(reader.facts["step"]))
    assert survey(directory).damaged == []
    return steps


def stop(pid: int) -> None:
    """SIGSTOP a process, and see that it stands still."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", f"process {pid} has not stopped")


def state_of(pid: int) -> str:
    """As /proc has it; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_until(
    there: Callable[[], object], otherwise: str, seconds: float = 60.0, more: Callable[[], str] = str
) -> None:
    """`more` is asked for what else to say when it did not come true."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"{otherwise} {more()}"
        time.sleep(0.01)


def problem_of(outcomes: list[Outcome]) -> str:
    """Why the only save that ended has failed."""
    (outcome,) = outcomes
    assert outcome.problem is not None
    return outcome.problem
