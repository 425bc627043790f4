"""One rank of the bench: all arms, repetition after repetition."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from checkpoints.bench.arms import Arms, gather, slowdown
from checkpoints.bench.state import State, step_seconds
from checkpoints.lines import tell

T = TypeVar("T")
_QUIET_SECONDS = 2.0  # of steps without a save


def run(rank: int, ranks: int, size: int, repetitions: int, directory: Path, meeting: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as source:
        source.write(os.urandom(1 << 20) * (size >> 20))
        arms = Arms(State.of_bytes(size, rank, ranks), directory, dist.barrier)
        try:
            for number in range(repetitions):
                found = _repetition(arms, number, Path(source.name))
                if rank == 0:
                    tell(repetition=number, bytes=arms.state.bytes * ranks, **found)
        finally:
            arms.close()
    dist.destroy_process_group()


def _repetition(arms: Arms, number: int, source: Path) -> dict[str, float]:
    """Seconds of each arm, of its slowest rank; CPU seconds of all."""
    ours, busy, peer = f"ours-{number}", f"busy-{number}", f"peer-{number}"
    found: dict[str, float] = {"memcpy": gather(arms.memcpy())}
    stall, seconds, _ = _timed(found, "ours", lambda: arms.save(ours))
    found |= {"stall": gather(stall), "ours": gather(seconds), "files": arms.files(ours)}
    stall, seconds = _timed(found, "dcp_async", lambda: arms.dcp_async(peer))
    found |= {"dcp_stall": gather(stall), "dcp_async": gather(seconds)}
    arms.forget(peer)
    plain: dict[str, Callable[[], float]] = {
        "dcp": lambda: arms.dcp_save(peer),
        "safetensors": lambda: arms.safetensors(peer),
        "direct": lambda: arms.direct(peer, source),
    }
    for name, arm in plain.items():
        found[name] = gather(_timed(found, name, arm))
        arms.forget(peer)
    found |= _loads(arms, ours)
    quiet = step_seconds(_QUIET_SECONDS)
    arms.barrier()
    _, _, saving = arms.save(busy, steps=0.02)
    found["slowdown"] = gather(slowdown(quiet, saving))
    arms.forget(ours, busy)
    return found


def _loads(arms: Arms, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for warmth in ("cold", "warm"):
        same = arms.load(name, arms.state.shards(), cold=warmth == "cold")
        other = arms.load(name, arms.state.columns(), cold=warmth == "cold")
        found |= {f"load_{warmth}": gather(same), f"reshard_{warmth}": gather(other)}
    found["checksums"] = gather(arms.checksums())
    return found


def _timed(found: dict[str, float], name: str, arm: Callable[[], T]) -> T:
    """Do it, and note the CPU seconds of all ranks and their children."""
    before = _cpu_seconds()
    result = arm()
    spent = torch.tensor(_cpu_seconds() - before, dtype=torch.float64)
    dist.all_reduce(spent)
    found[f"{name}_cpu"] = float(spent)
    return result


def _cpu_seconds() -> float:
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))
