"""What a rank of the bench holds, and what it does between saves."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from checkpoints.ranges import Shape
from checkpoints.reader import Shard

COLUMNS = 2048
TENSORS = 16
_STEP = 384  # a square product of this size takes some milliseconds of one core


@dataclass(frozen=True)
class State:
    """A rank's rows of TENSORS global fp32 matrices [ranks * rows, COLUMNS], random: nothing compresses."""

    rank: int
    ranks: int
    rows: int
    tensors: list[torch.Tensor]

    @classmethod
    def of_bytes(cls, size: int, rank: int, ranks: int) -> State:
        """About `size` bytes. Raises ValueError as `rows_for`."""
        rows = rows_for(size)
        torch.manual_seed(rank)
        return cls(rank, ranks, rows, [torch.randn(rows, COLUMNS) for _ in range(TENSORS)])

    @property
    def bytes(self) -> int:
        return TENSORS * self.rows * COLUMNS * 4

    @property
    def whole(self) -> Shape:
        return (self.ranks * self.rows, COLUMNS)

    def shards(self) -> list[Shard]:
        """As they were saved: by rows."""
        rows = (self.rank * self.rows, 0)
        return [Shard(f"matrix.{n}", self.whole, rows, tensor) for n, tensor in enumerate(self.tensors)]

    def columns(self) -> list[Shard]:
        """Room for the same number of bytes in another layout: by columns."""
        width = COLUMNS // self.ranks
        offset, height = (0, self.rank * width), self.whole[0]
        return [Shard(f"matrix.{n}", self.whole, offset, torch.empty(height, width)) for n in range(TENSORS)]

    def named(self) -> dict[str, torch.Tensor]:
        """For peers: names of this rank's own, so that each rank writes its part."""
        return {f"{self.rank}.matrix.{n}": tensor for n, tensor in enumerate(self.tensors)}


def rows_for(size: int) -> int:
    """Rows of each matrix in so many bytes. Raises ValueError for less than one."""
    rows = size // (4 * TENSORS * COLUMNS)
    if rows < 1:
        raise ValueError(f"{size} bytes per rank are too few for {TENSORS} matrices of {COLUMNS} columns")
    return rows


def step_seconds(seconds: float) -> list[float]:
    """Compute for so long, as a training does; how long each step took."""
    a, b = torch.randn(_STEP, _STEP), torch.randn(_STEP, _STEP)
    taken: list[float] = []
    deadline = time.perf_counter() + seconds
    while (began := time.perf_counter()) < deadline:
        for _ in range(8):
            a = torch.tanh(a @ b)
        taken.append(time.perf_counter() - began)
    return taken
