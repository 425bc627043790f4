"""A writer killed by SIGKILL at any point leaves intact checkpoints, or attempts that count for nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints.attempts import Retention, candidates, prune, survey
from checkpoints.reader import Reader, Shard

SHAPE = (1024, 1024)
SHARDS = 6


class Writer:
    """The process of killed_writer.py, which has imported everything once."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killed_writer.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def write(self, step: int, directory: Path, *, call: int = 0, seconds: float = 0.0) -> int | None:
        """Calls that the child made; None when it was killed, as asked by `call` or `seconds`."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{step} {directory} {SHARDS} {call} {seconds}\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return None
        return os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    writer = Writer()
    yield writer
    assert writer.process.stdin
    writer.process.stdin.close()
    assert writer.process.wait(20) == 0


def check_all(directory: Path) -> list[int]:
    """The steps of what counts, newest first, after every byte of it has been read."""
    steps = []
    for path in candidates(directory):
        reader = Reader(path)
        reader.verify()
        for number in range(SHARDS):
            found = torch.zeros(SHAPE)
            reader.read(Shard(f"t{number}", SHAPE, (0, 0), found))
            assert bool((found == reader.facts["step"]).all()), "a mix of two checkpoints"
        steps.append(int(reader.facts["step"]))
    assert survey(directory).damaged == []
    return steps


def test_killed_before_every_call(writer: Writer, tmp_path: Path) -> None:
    calls = writer.write(1, tmp_path)
    assert calls is not None
    assert calls > 12
    for call in range(1, calls + 1):
        assert writer.write(2, tmp_path, call=call) is None, "the kill did not land"
        committed = call == calls  # the last call only makes the manifest's name durable
        assert check_all(tmp_path) == ([2, 1] if committed else [1])
    left = calls - 3  # before the first two (mkdir) there is no attempt, after the last it is committed
    assert len(survey(tmp_path).uncommitted) == left
    assert len(prune(tmp_path, Retention(2), stale_seconds=-1.0)) == left
    assert writer.write(3, tmp_path) == calls
    assert check_all(tmp_path) == [3, 2, 1]


def test_killed_at_random_times(writer: Writer, tmp_path: Path) -> None:
    chance, landed, newest = random.Random(7), 0, 1
    writer.write(0, tmp_path)  # waits for the imports
    began = time.monotonic()
    writer.write(1, tmp_path)
    usual = time.monotonic() - began
    for step in range(2, 12):
        before = len(survey(tmp_path).uncommitted)
        writer.write(step, tmp_path, seconds=chance.uniform(usual / 10, usual))
        landed += len(survey(tmp_path).uncommitted) - before
        newest, previous = check_all(tmp_path)[0], newest
        assert newest in (previous, step)
        prune(tmp_path, Retention(2))
    assert landed >= 3, f"only {landed} of 10 kills fell into a write"
