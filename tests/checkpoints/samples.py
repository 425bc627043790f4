"""Committed checkpoints made without torch: tensors of random numbers, as training leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from checkpoints.attempts import begin, commit, write_durably, writer_name
from checkpoints.manifest import Manifest, Piece, aligned, block_ranges

Array = NDArray[Any]
_DTYPES = {"f4": "float32", "u2": "bfloat16", "i8": "int64", "u1": "uint8"}


def weights(count: int, seed: int = 0) -> Array:
    """Numbers as weights have them: normal, small."""
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype("<f4")


def as_bf16(values: Array) -> Array:
    """The bits of bf16, rounded towards zero."""
    return (values.view("<u4") >> 16).astype("<u2")


def checkpoint(
    directory: Path, tensors: Mapping[str, Array], step: int = 1, writers: int = 2, **facts: Any
) -> Path:
    """A committed attempt; tensors are dealt out to the writers in turn."""
    attempt = begin(directory, f"step-{step:08d}")
    for writer in range(writers):
        _write(attempt, writer, dict(list(tensors.items())[writer::writers]))
    commit(attempt, writers, "checkpoint", {"step": step, **facts})
    return attempt


def _write(attempt: Path, writer: int, tensors: Mapping[str, Array]) -> None:
    file, content, pieces = f"{writer_name(writer)}.bin", bytearray(), []
    for name, values in tensors.items():
        content.extend(bytes(aligned(len(content)) - len(content)))
        data = values.tobytes()
        sums = tuple(crc32c(data[start:stop]) for start, stop in block_ranges(len(data)))
        shape, dtype = tuple(values.shape), _DTYPES[values.dtype.str[1:]]
        pieces.append(Piece(name, shape, (0,) * len(shape), shape, dtype, file, len(content), sums))
        content.extend(data)
    (attempt / file).write_bytes(content)
    receipt = Manifest("receipt", tuple(pieces), {file: len(content)}, {})
    write_durably(attempt / f"{writer_name(writer)}.json", receipt.to_json())


def files(path: Path) -> dict[str, bytes]:
    """What a reader sees of a checkpoint: manifest and data."""
    return {
        p.name: p.read_bytes()
        for p in sorted(path.iterdir())
        if p.name == "manifest.json" or p.suffix == ".bin"
    }


def flip(path: Path, position: int) -> None:
    """Turn one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 4]))
