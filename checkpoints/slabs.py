"""A tensor of a checkpoint read row by row, whatever pieces it lies in: verified, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.blocks import Blocks
from checkpoints.manifest import BLOCK, Damaged, Piece
from checkpoints.ranges import Box, intersect, runs, subtract

SLAB = 16 << 20  # bytes of a tensor that are assembled at a time

Values = npt.NDArray[Any]


def slabs(shape: tuple[int, ...], item: int) -> Iterator[Box]:
    """Whole rows of a tensor, about SLAB bytes of them at a time."""
    if not shape:
        yield Box((), ())
        return
    row = Box((0,) * len(shape[1:]), shape[1:]).size * item
    at_once = max(1, SLAB // max(1, row))
    for first in range(0, shape[0], at_once):
        rows = min(at_once, shape[0] - first)
        yield Box((first, *(0 for _ in shape[1:])), (rows, *shape[1:]))


class Source:
    """One tensor of the source; at most `room` of its blocks lie in memory."""

    def __init__(self, path: Path, pieces: list[Piece], item: int, room: int) -> None:
        self.path, self.pieces, self.room = path, pieces, room
        self.dtype = np.dtype(f"u{item}")
        self.read_bytes = 0
        self._kept: OrderedDict[tuple[int, int], Values] = OrderedDict()

    def read(self, slab: Box) -> Values:
        """Verified values of whole rows. Raises Damaged."""
        values = np.empty(slab.shape, self.dtype)
        rest = [slab] if slab.size else []
        for number, piece in enumerate(self.pieces):
            if any(intersect(piece.box, box) for box in rest):
                self._copy(number, piece, slab, values)
                rest = [left for box in rest for left in subtract(box, piece.box)]
        if rest:
            where = f"at {rest[0].offset} of shape {rest[0].shape}"
            raise Damaged(self.path, f"tensor {self.pieces[0].name!r} has no piece {where}")
        return values

    def _copy(self, number: int, piece: Piece, slab: Box, values: Values) -> None:
        first, last = _elements(piece, slab)
        per_block = BLOCK // self.dtype.itemsize
        for index in range(first // per_block, -(-last // per_block)):
            begin = index * per_block
            block = self._block(number, piece, index)
            start, stop = max(first, begin), min(last, begin + len(block))
            done = start - begin
            for box in runs(piece.shape, start, stop):
                part = block[done : done + box.size].reshape(box.shape)
                values[box.moved(piece.offset).slices(slab)] = part
                done += box.size
            if stop == begin + len(block):
                del self._kept[number, index]  # rows come in order: nobody asks again

    def _block(self, number: int, piece: Piece, index: int) -> Values:
        key = (number, index)
        if key not in self._kept:
            while len(self._kept) >= self.room:
                self._kept.popitem(last=False)
            data = Blocks(self.path).read(piece, index)
            self.read_bytes += len(data)
            self._kept[key] = np.frombuffer(data, self.dtype)
        self._kept.move_to_end(key)
        return self._kept[key]


def _elements(piece: Piece, slab: Box) -> tuple[int, int]:
    """First and last element + 1 of a piece's rows that lie in a slab of whole rows."""
    if not piece.shape:
        return 0, 1
    row = Box(piece.offset[1:], piece.shape[1:]).size
    low = max(slab.offset[0], piece.offset[0])
    high = min(slab.end[0], piece.box.end[0])
    return (low - piece.offset[0]) * row, (high - piece.offset[0]) * row
