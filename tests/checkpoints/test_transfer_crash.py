"""A sender killed by SIGKILL at any moment costs a chunk per stream, never the checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from checkpoints.attempts import survey
from checkpoints.chunks import cut
from checkpoints.manifest import load
from checkpoints.reader import Reader
from tests.checkpoints.samples import checkpoint, files, weights

LARGEST = 1 << 19
KILLS = 10
CHUNKS = 60
STREAMS = 3


class Sender:
    """The process of killed_sender.py, and what its children wrote into their log."""

    def __init__(self, source: Path, target: Path) -> None:
        self.log = target.with_suffix(".log")
        self.line = f"{source} {target} {self.log} {STREAMS} {LARGEST}\n"
        script = Path(__file__).with_name("killed_sender.py")
        command = [sys.executable, "-P", str(script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self) -> int:
        assert self.process.stdin
        self.process.stdin.write(self.line)
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """How the copy ended: 0, or the signal that killed it, negative."""
        return os.waitstatus_to_exitcode(self._answer())

    def _answer(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def sent(self) -> list[int]:
        """Indexes of the chunks that crossed, in order, those on their way included."""
        return (
            [int(line.split()[0]) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        )

    def close(self) -> None:
        self.process.communicate(timeout=20)


def test_ten_kills_cost_a_chunk_per_stream_each(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "here", {f"t{n}": weights(100_000, n) for n in range(CHUNKS)})
    assert len(cut(load(source), LARGEST)) == CHUNKS
    target, chance = tmp_path / "there", random.Random(3)
    sender = Sender(source, target)
    for kill in range(KILLS):
        before, pid = len(sender.sent()), sender.start()
        goal = before + chance.randint(1, CHUNKS // KILLS)  # so that every kill falls into the copy
        while len(sender.sent()) < goal:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)  # at worst a zombie: it has not been waited for
        assert sender.wait() == -signal.SIGKILL
        found = survey(target)
        assert found.intact == found.damaged == found.uncommitted == [], f"kill {kill}"
    sender.start()
    assert sender.wait() == 0
    sender.close()
    counts = Counter(sender.sent())
    resent = sum(count - 1 for count in counts.values())
    print(f"{KILLS} kills, {STREAMS} streams: {resent} of {CHUNKS} chunks sent again")
    assert len(counts) == CHUNKS
    assert resent <= KILLS * STREAMS
    (copied,) = survey(target).intact
    assert files(copied) == files(source)
    Reader(copied).verify()
