"""Copies a checkpoint in forked children that are killed on the way: see test_transfer_crash.py.

A line on standard input, "<source> <target> <log> <streams> <largest>", makes one child copy. The answers
are its process id, and when it has ended its wait status. Every chunk that crosses is written to the log
before it is stored: "<index> <bytes>".
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from checkpoints.codecs import Encoded
from checkpoints.flat import FlatSource
from checkpoints.receive import FlatTarget
from checkpoints.transfer import Options, replicate


class Logged(FlatTarget):
    log = -1

    def write(self, index: int, sent: Encoded) -> None:
        os.write(self.log, f"{index} {len(sent.payload)}\n".encode())  # one write, appended: whole or not
        super().write(index, sent)


def copy(source: str, target: str, log: str, streams: str, largest: str) -> None:
    Logged.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    options = Options(streams=int(streams), largest=int(largest))
    replicate(
        lambda name: FlatSource(Path(source), name, options.largest),
        # a slow link, so that kills fall into chunks
        lambda: Logged(Path(target), lambda _: time.sleep(0.004), options.largest),
        options,
    )


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            copy(*line.split())
            os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
