"""Entries that a nursery can fork instead of a training rank: `--entry fake_ranks:<name>`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from clusters.events import CHECKPOINT_SAVED, EventWriter
from clusters.paths import SegmentPaths
from clusters.segment import EXIT_BAD_INPUT, EXIT_DRAINED


def environment(segment: Path) -> int:
    """Tells what it was given."""
    print("a line on standard output")
    facts = {"argument": str(segment), "group": os.getpgid(0), "pid": os.getpid(), "env": dict(os.environ)}
    opened = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]  # not iterdir's own
    facts["descriptors"] = sorted(str(entry.readlink()) for entry in opened)
    (segment / "facts.json").write_text(json.dumps(facts))
    return 7


def crash(segment: Path) -> int:
    raise RuntimeError("the reason for the crash")


def leave(segment: Path) -> int:
    """Not every library returns."""
    sys.exit("a message instead of a code")


def family(segment: Path) -> int:
    """Has a child in its group that outlives it, and is asked to end in ways it does not heed."""
    child = subprocess.Popen(["sleep", "600"])
    (segment / "child").write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    (segment / "ready").touch()
    return wait_for(segment / "go", 0)


def multiply(segment: Path) -> int:
    """Checks a matrix product in a forked process, where a pool of threads that was not forked would hang."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(256, 512, dtype=torch.float64), torch.randn(512, 128, dtype=torch.float64)
    by_hand = (a[:, :, None] * b[None, :, :]).sum(1)
    leaf = torch.ones(64, 64, requires_grad=True)
    (leaf @ leaf).sum().backward()
    assert leaf.grad is not None
    right = torch.allclose(a @ b, by_hand) and bool((leaf.grad == 128).all())
    return 0 if right and not torch.cuda.is_initialized() else 9


def wait_for(path: Path, code: int) -> int:
    while not path.exists():
        time.sleep(0.01)
    return code


def obedient(segment: Path) -> int:
    """A rank as the supervisor knows it: ends with 80 at `drain`; with n when a file `end.n` appears;
    rank 0 saves a checkpoint when told so by `save`, and crashes when told so by `crash`."""
    paths, rank = SegmentPaths(segment), int(os.environ["RANK"])
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} in generation {os.environ['EUROTRAIN_GENERATION']}")
    (segment / f"env.{os.environ['EUROTRAIN_GENERATION']}.{rank}").write_text(json.dumps(dict(os.environ)))
    while not paths.drain.exists():
        for path in segment.glob("end.*"):
            return int(path.suffix[1:])
        if rank == 0 and (segment / "save").exists():
            (segment / "save").unlink()
            EventWriter(paths.events / "ranks.jsonl").emit(
                CHECKPOINT_SAVED, step=1, path="", bytes=0, seconds=0.0
            )
        if rank == 0 and (segment / "crash").exists():
            raise RuntimeError("told to crash")
        time.sleep(0.01)
    return EXIT_DRAINED


def choosy(segment: Path) -> int:
    """Rank 1 finds its input bad; rank 0 dies of that, as one does in a collective."""
    if os.environ["RANK"] == "1":
        print("eurotrain: data/text: token 7 is none of 5", flush=True)
        return EXIT_BAD_INPUT
    time.sleep(0.005)
    raise RuntimeError("connection closed by peer")


def deaf(segment: Path) -> int:
    """Heeds no marker."""
    return wait_for(segment / "never", 0)
