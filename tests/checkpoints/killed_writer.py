"""Writes checkpoints in forked children that are killed: see test_crash.py.

A line on standard input, "<step> <directory> <shards> <call> <seconds>", makes one child write a
checkpoint of `shards` 4 MiB tensors, all of value `step`. It is killed by SIGKILL at its call number
`call` (from 1) of those that change the file system, or after `seconds`; zeros spare it. The answer is its
wait status; the exit code of a child that was spared is the number of such calls it made.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoints.attempts import begin, commit
from checkpoints.reader import Shard
from checkpoints.store import write_shards

SHAPE = (1024, 1024)


class Countdown:
    """Kills this process just before the chosen call."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.made = 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.made += 1
            if self.made == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted


def write(step: int, directory: Path, last: int, count: int) -> int:
    countdown = Countdown(last)
    for name in ("mkdir", "fsync", "rename"):
        setattr(os, name, countdown.wrap(getattr(os, name)))

    def tensors(part: int) -> list[Shard]:
        values = torch.full(SHAPE, float(step))
        make = countdown.wrap(lambda n: Shard(f"t{n}", SHAPE, (0, 0), values))
        return (make(n) for n in range(part, count, 2))  # type: ignore[return-value] # taken one at a time

    attempt = begin(directory, f"step-{step:08d}")
    for writer in range(2):
        write_shards(attempt, writer, tensors(writer))
    commit(attempt, 2, "checkpoint", {"step": step})
    return countdown.made


def main() -> None:
    for line in sys.stdin:
        step, directory, shards, call, seconds = line.split()
        pid = os.fork()
        if pid == 0:
            os._exit(min(write(int(step), Path(directory), int(call), int(shards)), 255))
        if float(seconds):
            time.sleep(float(seconds))
            os.kill(pid, signal.SIGKILL)  # at worst a zombie: it has not been waited for
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
