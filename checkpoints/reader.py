"""Reading a committed checkpoint or update in any layout, whatever layout wrote it.

A block of a piece (64 MiB at most) is read, verified, and only then copied to where it belongs, so that
damage is never loaded and memory stays at one block beside the tensors that are filled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints import manifest as form
from checkpoints.blocks import Blocks, verify
from checkpoints.manifest import ITEM_BYTES, Piece
from checkpoints.ranges import Box, Shape, intersect, runs, subtract


@dataclass
class Shard:
    """A rank's part of a global tensor, under the tensor's canonical name."""

    name: str
    global_shape: Shape
    offset: Shape
    tensor: torch.Tensor  # its shape is the shard's

    @property
    def box(self) -> Box:
        return Box(self.offset, tuple(self.tensor.shape))


class Missing(KeyError):
    """Something that was asked for is in no piece."""

    def __str__(self) -> str:  # KeyError would print the quoted repr
        return str(self.args[0])


class Reader:
    """Reads a committed attempt in any layout, a block at a time, and verifies every block it reads."""

    def __init__(self, path: Path) -> None:
        """Raises Damaged, or FileNotFoundError when there is no manifest."""
        self.path = path
        self.manifest = form.load(path)
        form.check_files(path, self.manifest)
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.manifest.pieces:
            self._pieces[piece.name].append(piece)
        self._blocks = Blocks(path)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest.facts

    def read(self, shard: Shard) -> None:
        """Fill `shard.tensor` in place from whatever pieces hold its elements.

        Raises Missing when some of its elements are in no piece, ValueError when the tensor has another
        global shape or dtype here, Damaged when what was read is not what was written.
        """
        rest = [shard.box] if shard.box.size else []
        for piece in self._pieces.get(shard.name, []):
            _check_fit(piece, shard)
            if any(intersect(piece.box, box) for box in rest):  # else a replica of what is there already
                self._copy(piece, shard)
                rest = [left for box in rest for left in subtract(box, piece.box)]
        if rest:
            where = f"at {rest[0].offset} of shape {rest[0].shape}"
            raise Missing(f"{self.path}: tensor {shard.name!r} has no piece {where}")

    def verify(self) -> None:
        """Read everything, padding included. Raises Damaged."""
        verify(self.path, self.manifest)

    def _copy(self, piece: Piece, shard: Shard) -> None:
        item = ITEM_BYTES[piece.dtype]
        target = shard.tensor.detach()
        for index, (start, stop) in enumerate(form.block_ranges(piece.bytes)):
            boxes = list(runs(piece.shape, start // item, stop // item))
            moved = [box.moved(piece.offset) for box in boxes]
            if not any(intersect(box, shard.box) for box in moved):
                continue
            elements = torch.frombuffer(self._blocks.read(piece, index), dtype=target.dtype)
            sizes = [box.size for box in boxes]
            for box, values in zip(moved, torch.split(elements, sizes), strict=True):
                common = intersect(box, shard.box)
                if common is not None:
                    source = values.view(box.shape)[common.slices(box)]
                    target[common.slices(shard.box)].copy_(source)


def _check_fit(piece: Piece, shard: Shard) -> None:
    wanted = (tuple(shard.global_shape), dtype_name(shard.tensor.dtype))
    if wanted != (piece.global_shape, piece.dtype):
        raise ValueError(
            f"tensor {shard.name!r} is {piece.dtype} {piece.global_shape} here, not {wanted[1]} {wanted[0]}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
