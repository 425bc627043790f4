"""Reading a committed checkpoint or update in any layout, whatever layout wrote it.

A block of a piece (64 MiB at most) is read, verified, and only then copied to where it belongs, so that
damage is never loaded and memory stays at one block beside the tensors that are filled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints import manifest as form
from checkpoints.blocks import Blocks, verify
from checkpoints.formats import ITEM_BYTES, QUANTISED
from checkpoints.manifest import Damaged, Piece
from checkpoints.quantised import CutMaxima, decode, encode
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

    @property
    def dtype(self) -> str:
        """How it is written."""
        return dtype_name(self.tensor.dtype)

    def stored(self) -> torch.Tensor:
        """The bytes that are written: uint8, on the CPU."""
        return self.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@dataclass
class QuantisedShard(Shard):
    """A shard of fp32 values that is written quantised."""

    form: str  # a key of QUANTISED
    cuts: list[CutMaxima]  # of all shards of the tensor

    @property
    def dtype(self) -> str:
        return self.form

    def stored(self) -> torch.Tensor:
        values = self.tensor.detach()
        return encode(self.name, self.offset, values, QUANTISED[self.form], self.cuts).cpu()


class Missing(KeyError):
    """Something that was asked for is in no piece."""

    def __str__(self) -> str:  # KeyError would print the quoted repr
        return str(self.args[0])


class Reader:
    """Reads a committed attempt in any layout, a block at a time, and verifies every block it reads."""

    def __init__(self, path: Path, copies: Sequence[Path | Blocks] = ()) -> None:
        """`copies` are other places in which some of the files may lie as well, and are read first: what is
        wrong with them is in `bad_copies`. Raises Damaged, or FileNotFoundError without a manifest."""
        self.path = path
        self.manifest = form.load(path)
        form.check_files(path, self.manifest)
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.manifest.pieces:
            self._pieces[piece.name].append(piece)
        self._blocks = Blocks(path, copies)
        self._last: tuple[Piece, int, memoryview] | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest.facts

    @property
    def bad_copies(self) -> Mapping[Path, Damaged]:
        return self._blocks.bad_copies

    def read(self, shard: Shard) -> None:
        """Fill `shard.tensor` in place from whatever pieces hold its elements; fp32 also from quantised ones.

        Raises Missing when some of its elements are in no piece, ValueError when the tensor has another
        global shape or dtype here, Damaged when what was read is not what was written.
        """
        rest = [shard.box] if shard.box.size else []
        for piece in self._pieces.get(shard.name, []):
            _check_fit(piece, shard)
            if any(intersect(piece.box, box) for box in rest):  # else a replica of what is there already
                copy = self._decode if piece.dtype in QUANTISED else self._copy
                copy(piece, shard)
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
            elements = torch.frombuffer(self._block(piece, index), dtype=target.dtype)
            sizes = [box.size for box in boxes]
            for box, values in zip(moved, torch.split(elements, sizes), strict=True):
                common = intersect(box, shard.box)
                if common is not None:
                    source = values.view(box.shape)[common.slices(box)]
                    target[common.slices(shard.box)].copy_(source)

    def _block(self, piece: Piece, index: int) -> memoryview:
        """Shards that are read one after the other, such as the boxes of a share, often lie in one block: it
        is read and verified once."""
        if self._last is None or self._last[0] is not piece or self._last[1] != index:
            self._last = None  # the bytes that it has are overwritten, also when this fails
            self._last = (piece, index, self._blocks.read(piece, index))
        return self._last[2]

    def _decode(self, piece: Piece, shard: Shard) -> None:
        """A quantised piece is read as a whole: a quarter of what the tensor that it fills takes."""
        common = intersect(piece.box, shard.box)
        assert common is not None
        blocks = (bytes(self._block(piece, index)) for index in range(len(piece.checksums)))
        stored = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8)
        values = decode(stored, piece.offset, piece.shape, QUANTISED[piece.dtype])
        shard.tensor.detach()[common.slices(shard.box)].copy_(values[common.slices(piece.box)])


def _check_fit(piece: Piece, shard: Shard) -> None:
    wanted = (tuple(shard.global_shape), dtype_name(shard.tensor.dtype))
    found = (piece.global_shape, "float32" if piece.dtype in QUANTISED else piece.dtype)
    if wanted != found:
        raise ValueError(
            f"tensor {shard.name!r} is {piece.dtype} {piece.global_shape} here, not {wanted[1]} {wanted[0]}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
