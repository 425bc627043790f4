"""`python -P -m checkpoints.bench DIRECTORY`: a JSON line for each repetition.

All arms run in every repetition, one after the other on the same disk. The first repetition is told apart:
its buffers are touched for the first time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from torch.multiprocessing.spawn import spawn

from checkpoints.bench.rank import run
from checkpoints.bench.state import COLUMNS, rows_for
from checkpoints.lines import exit_code


def main(directory: Path, ranks: int, size: int, repetitions: int) -> None:
    """Raises OSError where the disk has no room, ValueError for too small a state."""
    rows_for(size)
    if COLUMNS % ranks:
        raise ValueError(f"{ranks} ranks cannot share {COLUMNS} columns evenly: take a power of two")
    needed = 8 * ranks * size
    if (free := shutil.disk_usage(directory).free) < needed:
        raise OSError(f"{directory}: {needed >> 20} MiB are needed, {free >> 20} MiB are free")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as folder:
        meeting = Path(folder) / "meeting"
        arguments = (ranks, size, repetitions, Path(folder), meeting)
        spawn(run, arguments, nprocs=ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="checkpoints.bench")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True, help="of each rank")
    parser.add_argument("--repetitions", type=int, required=True)
    given = parser.parse_args()
    sys.exit(exit_code(lambda: main(given.directory, given.ranks, given.bytes, given.repetitions)))
