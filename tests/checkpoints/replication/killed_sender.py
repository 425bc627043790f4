"""Copies a checkpoint in forked children that are killed on the way: see test_transfer_crash.py.

A line on standard input, "<source> <target> <log> <streams> <largest> <slices>", makes one child copy. It is
killed by SIGKILL within a chunk, when it has sent so many slices, whatever its other streams do just then;
0 spares it. The answer is its wait status. Every chunk that crosses is written to the log before it is
stored: "<index> <bytes>".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from checkpoints.replication.compression import Encoded
from checkpoints.replication.ends import Target
from checkpoints.replication.flat import FlatSource
from checkpoints.replication.packed import PackTarget
from checkpoints.replication.packs import Store
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.transfer import Options, replicate


class Logged:
    """Written into by several threads and, one after the other, processes: each line is one write."""

    log = -1

    def note(self, index: int, sent: Encoded) -> None:
        os.write(self.log, f"{index} {len(sent.payload)}\n".encode())


class LoggedFlat(Logged, FlatTarget):
    def write(self, index: int, sent: Encoded) -> None:
        self.note(index, sent)
        super().write(index, sent)


class LoggedPacks(Logged, PackTarget):
    def write(self, index: int, sent: Encoded) -> None:
        self.note(index, sent)
        super().write(index, sent)


class SlowLink:
    """Every slice takes 4 ms, and the last one everything."""

    def __init__(self, slices: int) -> None:
        self.left = slices
        self.lock = threading.Lock()

    def __call__(self, _: int) -> None:
        time.sleep(0.004)
        with self.lock:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def copy(source: str, target: str, log: str, streams: str, largest: str, slices: str) -> None:
    Logged.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    options, link = Options(streams=int(streams), largest=int(largest)), SlowLink(int(slices))
    if "://" in target:
        opened: partial[Target] = partial(LoggedPacks, Store(target), link, options.largest)
    else:
        opened = partial(LoggedFlat, Path(target), link, options.largest)
    replicate(partial(FlatSource, Path(source), largest=options.largest), opened, options)


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            copy(*line.split())
            os._exit(0)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
