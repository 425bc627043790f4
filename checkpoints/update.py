"""The file of an outer update: a manifest of kind "update", whose facts are its header. No torch.

Its pieces hold one island's difference from the common base, plain or quantised (checkpoints/formats.py).
An island whose state all others shall take adds its base and momentum in fp32, under names that begin
with "outer.". The controller inspects an update before it counts for anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.blocks import Blocks
from checkpoints.formats import QUANTISED, QUANTISERS
from checkpoints.manifest import Manifest, Piece, check_files

STATE = "outer."

_LARGEST = float(np.finfo(np.float32).max)
_CHUNK = 1 << 20  # codes squared at a time: 4 MiB


@dataclass(frozen=True)
class Header:
    """What an update says of itself. Raises ValueError when that is odd."""

    run: str
    site: str
    round: int
    base: str  # identity of the round before (clusters/rounds.py)
    tokens: int  # trained since the base, and in no round yet
    step: int  # the island's, when it contributed
    quantiser: str  # a key of QUANTISERS
    state: bool  # whether base and momentum come along
    sketch: Mapping[str, list[float]]  # of the base (parallelism/drift.py), by tensor
    fragment: int = 0  # an update is of the whole model: fragment 0 of 1
    fragments: int = 1

    def __post_init__(self) -> None:
        for entry in fields(self):
            kind = {"int": int, "str": str, "bool": bool}.get(str(entry.type), dict)
            if type(getattr(self, entry.name)) is not kind:
                raise ValueError(f"the update's {entry.name} is no {kind.__name__}")
        allowed = {
            "round": self.round >= 1,
            "tokens": self.tokens >= 1,
            "step": self.step >= 0,
            "quantiser": self.quantiser in QUANTISERS,
            "fragment": (self.fragment, self.fragments) == (0, 1),
            "sketch": all(map(_are_numbers, self.sketch.values())),
        }
        for name, fine in allowed.items():
            if not fine:
                raise ValueError(f"the update's {name} cannot be {getattr(self, name)!r:.80}")

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, manifest: Manifest) -> Header:
        """Raises ValueError when the manifest is not an update's."""
        if manifest.kind != "update":
            raise ValueError(f"a {manifest.kind}, not an update")
        names = {entry.name for entry in fields(cls)}
        if set(manifest.facts) != names:
            odd = ", ".join(sorted(names ^ set(manifest.facts)))
            raise ValueError(f"the update's header lacks, or should lack, {odd[:200]}")
        return cls(**manifest.facts)


def inspect(directory: Path, manifest: Manifest) -> float:
    """Verify every byte of an update; the L2 norm of its difference, inf when that is not finite.

    A piece lies in memory at a time. Raises Damaged, ValueError for a header or a piece that no update has.
    """
    header = Header.of(manifest)
    check_files(directory, manifest)
    blocks, squares = Blocks(directory), 0.0
    for piece in manifest.pieces:
        of_state = piece.name.startswith(STATE)
        expected = "float32" if of_state else QUANTISERS[header.quantiser]
        if piece.dtype != expected:
            raise ValueError(f"tensor {piece.name!r} is {piece.dtype}, not {expected}")
        own = _squares(piece, (blocks.read(piece, index) for index in range(len(piece.checksums))))
        blocks.check_padding(piece, manifest.files[piece.file])
        if not math.isfinite(own):
            return math.inf
        squares += 0.0 if of_state else own
    return math.sqrt(squares)


def _squares(piece: Piece, blocks: Iterator[memoryview]) -> float:
    """Sum of the squares of a piece's values; not finite when one of them is not, in fp32."""
    if piece.dtype == "float32":
        parts = (np.frombuffer(block, dtype="<f4").astype(np.float64) for block in blocks)
        return float(sum(np.dot(part, part) for part in parts))
    form, rows = QUANTISED[piece.dtype], piece.shape or (1,)
    stored = np.frombuffer(b"".join(blocks), dtype=np.uint8)
    end = form.scale_bytes(piece.offset, piece.shape)
    scales = _bfloat16(stored[:end]).reshape(-1, form.groups(piece.offset, piece.shape)[-1])
    if not bool((np.abs(scales) * 2 ** (form.bits - 1) <= _LARGEST).all()):
        return math.inf
    codes = stored[end:].view(np.int8) if form.bits == 8 else _nibbles(stored[end:], math.prod(rows))
    first = form.group - form.phase(piece.offset)
    starts = [0, *range(first, rows[-1], form.group)]
    sums = _group_sums(codes.reshape(-1, rows[-1]), starts)
    return float((np.concatenate(list(sums)) * scales**2).sum())


def _group_sums(codes_RC: npt.NDArray[np.int8], starts: list[int]) -> Iterable[npt.NDArray[np.float64]]:
    """Sums of the squared codes of each row's groups."""
    at_once = max(1, _CHUNK // codes_RC.shape[1])
    for row in range(0, codes_RC.shape[0], at_once):
        squares = np.square(codes_RC[row : row + at_once], dtype=np.int32)
        yield np.add.reduceat(squares, starts, axis=1).astype(np.float64)


def _bfloat16(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _nibbles(stored: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    pairs = np.stack((stored & 15, stored >> 4), axis=-1).reshape(-1)[:count]
    return pairs.astype(np.int8) - np.int8(8)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is float and math.isfinite(v) for v in values)
