"""A sender killed by SIGKILL at any moment costs a chunk per stream, never the checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from checkpoints.attempts import survey
from checkpoints.manifest import load
from checkpoints.reader import Reader
from checkpoints.replication.chunks import cut
from checkpoints.replication.packed import PackSource
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.transfer import Options, replicate
from tests.checkpoints.samples import checkpoint, files, weights

LARGEST = 1 << 19
KILLS = 10
CHUNKS = 60
STREAMS = 3


class Sender:
    """The process of killed_sender.py, and what its children wrote into their log."""

    def __init__(self, source: Path, target: str, folder: Path) -> None:
        self.log = folder / "sent.log"
        self.line = f"{source} {target} {self.log} {STREAMS} {LARGEST}"
        script = Path(__file__).with_name("killed_sender.py")
        command = [sys.executable, "-P", str(script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def copy(self, slices: int = 0) -> int:
        """How the copy ended: 0, or the signal that killed it after so many slices, negative."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{self.line} {slices}\n")
        self.process.stdin.flush()
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def sent(self) -> list[int]:
        """Indexes of the chunks that crossed, in order, those on their way included."""
        return (
            [int(line.split()[0]) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        )

    def close(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = checkpoint(tmp_path / "here", {f"t{n}": weights(100_000, n) for n in range(CHUNKS)})
    assert len(cut(load(found), LARGEST)) == CHUNKS
    return found


def kill_and_finish(sender: Sender, chance: random.Random, nothing_counts: Callable[[], bool]) -> None:
    """Ten kills, each into the copy, then one copy to its end; what crossed twice is counted."""
    for kill in range(KILLS):
        # of two slices per chunk: ten kills do not suffice for all chunks
        assert sender.copy(chance.randint(1, 2 * CHUNKS // KILLS)) == -signal.SIGKILL
        assert nothing_counts(), f"kill {kill}"
    assert sender.copy() == 0
    sender.close()
    counts = Counter(sender.sent())
    resent = sum(count - 1 for count in counts.values())
    print(f"{KILLS} kills, {STREAMS} streams: {resent} of {CHUNKS} chunks sent again")
    assert len(counts) == CHUNKS
    assert resent <= KILLS * STREAMS


def test_ten_kills_cost_a_chunk_per_stream_each(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"

    def nothing_counts() -> bool:
        found = survey(target)
        return found.intact == found.damaged == found.uncommitted == []

    kill_and_finish(Sender(source, str(target), tmp_path), random.Random(3), nothing_counts)
    (copied,) = survey(target).intact
    assert files(copied) == files(source)
    Reader(copied).verify()


def test_ten_kills_cost_no_more_where_chunks_are_packed(source: Path, tmp_path: Path) -> None:
    """Packs that no index tells of: their records are found by their heads."""
    url = f"file://{tmp_path}/store"

    def nothing_counts() -> bool:
        return not list((tmp_path / "store").glob("*/manifest.json"))

    kill_and_finish(Sender(source, url, tmp_path), random.Random(4), nothing_counts)
    back = partial(FlatTarget, tmp_path / "back", largest=LARGEST)
    outcome = replicate(partial(PackSource, url), back, Options(largest=LARGEST))
    assert files(Path(outcome.where)) == files(source)
