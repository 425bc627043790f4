"""The arms of `eurotrain bench checkpoint`, each peer at its fastest documented setting.

Every arm that writes is durable when it returns: file contents and names are synchronised with the disk.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
    save,
)

from checkpoints import attempts
from checkpoints.attempts import Retention
from checkpoints.bench.state import State, step_seconds
from checkpoints.manifest import BLOCK
from checkpoints.reader import Reader, Shard
from checkpoints.saver import Saver
from checkpoints.writer import Commit

Clock = Callable[[], float]
_PATIENCE = 120.0  # seconds without a sign of a writer


class Arms:
    """One rank's. `name` of a save is the same on all ranks: ranks call every method together."""

    def __init__(self, state: State, directory: Path, barrier: Callable[[], None]) -> None:
        self.state, self.directory, self.barrier = state, directory, barrier
        self.saver = Saver(writer=state.rank, patience=_PATIENCE)
        self.saver.prepare(state.shards())
        self.owned = [torch.zeros_like(tensor) for tensor in state.tensors]
        # Facts of the field: a stager that is used again, and shared memory for the process that writes.
        self.stager = DefaultStager(StagingOptions(False, True, False, False))

    def close(self) -> None:
        self.saver.close()
        self.stager.close()

    # ---- the stall of a step

    def memcpy(self) -> float:
        """Seconds to copy the state once within memory that is there: no asynchronous save stalls less."""
        began = time.perf_counter()
        for target, source in zip(self.owned, self.state.tensors, strict=True):
            target.copy_(source)
        return time.perf_counter() - began

    def save(self, name: str, steps: float = 0.0) -> tuple[float, float, list[float]]:
        """Ours: seconds of stall, seconds until committed, and the steps computed meanwhile if asked for."""
        attempt = self.attempt(name)
        commit = Commit(self.state.ranks, {"step": 1}, _PATIENCE, Retention(1 << 20))
        began = time.perf_counter()
        stall = self.saver.save(attempt, self.state.shards(), commit if self.state.rank == 0 else None)
        taken: list[float] = []
        while steps and self.saver.busy:
            taken += step_seconds(steps)
            self.saver.watch()
        for outcome in self.saver.finish():
            if outcome.problem:
                raise OSError(outcome.problem)
        return stall, time.perf_counter() - began, taken

    def dcp_async(self, name: str) -> tuple[float, float]:
        """torch's DCP with a process of its own: seconds of stall, and until it is done."""
        target = self.directory / name
        began = time.perf_counter()
        response = async_save(
            self.state.named(),
            storage_writer=FileSystemWriter(target, sync_files=True),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self.stager,
        )
        done = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
        assert isinstance(done, Future)
        stall = time.perf_counter() - began
        done.result()
        return stall, time.perf_counter() - began

    # ---- durable writes

    def dcp_save(self, name: str) -> float:
        began = time.perf_counter()
        save(self.state.named(), storage_writer=FileSystemWriter(self.directory / name, sync_files=True))
        return time.perf_counter() - began

    def safetensors(self, name: str) -> float:
        target = self.directory / name
        target.mkdir(exist_ok=True)
        path = target / f"{self.state.rank}.safetensors"
        began = time.perf_counter()
        save_file(self.state.named(), path)
        attempts.synchronise(path)
        attempts.synchronise(target)
        return time.perf_counter() - began

    def direct(self, name: str, source: Path) -> float:
        """The disk's own limit: dd from memory, past the page cache."""
        target = self.directory / name
        target.mkdir(exist_ok=True)
        words = [
            f"if={source}",
            f"of={target / str(self.state.rank)}",
            "bs=16M",
            "oflag=direct",
            "conv=fsync",
        ]
        began = time.perf_counter()
        subprocess.run(["dd", *words], check=True, capture_output=True)
        return time.perf_counter() - began

    # ---- loading

    def load(self, name: str, shards: list[Shard], *, cold: bool) -> float:
        attempt = self.attempt(name)
        if cold:
            for path in attempt.glob("*.bin"):
                _forget(path)
        self.barrier()
        began = time.perf_counter()
        reader = Reader(attempt)
        for shard in shards:
            reader.read(shard)
        return time.perf_counter() - began

    def checksums(self) -> float:
        """Seconds that the checksums of the state take, block by block."""
        began = time.perf_counter()
        for tensor in self.state.tensors:
            data = tensor.view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), BLOCK):
                crc32c(data[start : start + BLOCK])
        return time.perf_counter() - began

    # ----

    def attempt(self, name: str) -> Path:
        return self.directory / f"{name}.0001"

    def forget(self, *names: str) -> None:
        self.barrier()
        if self.state.rank == 0:
            for name in names:
                for path in (self.directory / name, self.attempt(name)):
                    shutil.rmtree(path, ignore_errors=True)
        self.barrier()

    def files(self, name: str) -> int:
        """Of one checkpoint: all ranks here are on one node."""
        assert attempts.candidates(self.directory), "nothing was committed"
        return len([*self.attempt(name).iterdir()])


def slowdown(quiet: list[float], saving: list[float]) -> float:
    """Median step while a save was under way, over the median step without one."""
    return statistics.median(saving) / statistics.median(quiet)


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def gather(value: Any) -> float:
    """The slowest rank's: an island goes on when all of its ranks do."""
    slowest = torch.tensor(float(value), dtype=torch.float64)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return float(slowest)
