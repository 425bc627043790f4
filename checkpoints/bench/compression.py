"""Lossless compression of a checkpoint's chunks, ours beside ZipNN's, in one process and interleaved.

    python -P -m checkpoints.bench.compression CHECKPOINT REPETITIONS

Both work on the same bytes, chunk by chunk, and must give them back; CPU seconds are counted, of all threads.
Trained fp32 weights are measured as they are, and rounded to bf16, the form in which most models train.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.lines import exit_code, tell
from checkpoints.manifest import Piece, load
from checkpoints.replication import compression
from checkpoints.replication.compression import Data, Encoded
from checkpoints.replication.flat import locate, read_range

_AT_MOST = 256 << 20  # bytes that are measured per kind: the figures do not change beyond
_CHUNK = 32 << 20

Figures = dict[str, float]  # ratio, and bytes per CPU second of both directions
Coder = tuple[Callable[[bytes], bytes], Callable[[bytes, int], Data]]


def main(arguments: list[str]) -> None:
    """Tell one line per kind of tensor and repetition. Raises ValueError."""
    path, repetitions = locate(Path(arguments[0])), int(arguments[1])
    for _ in range(repetitions):
        for kind, width, data in _samples(path):
            ours = _measure(_ours(width), data)
            tell(kind=kind, bytes=len(data), ours=ours, peer=_measure(_zipnn(width), data))


def _samples(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Kinds of tensors: weights, and what else has their dtype, the optimizer's state above all."""
    pieces = [piece for piece in load(path).pieces if piece.dtype in ("float32", "bfloat16")]
    weights = [piece for piece in pieces if not _is_state(piece)]
    for name, wanted in (("weights", weights), ("optimizer state", [p for p in pieces if _is_state(p)])):
        for dtype, width in (("float32", 4), ("bfloat16", 2)):
            data = _gathered(path, [piece for piece in wanted if piece.dtype == dtype])
            if data:
                yield f"{name}, {dtype}", width, data
            if data and dtype == "float32":
                yield f"{name}, rounded to bfloat16", 2, _rounded(data)


def _is_state(piece: Piece) -> bool:
    return "optimizer" in piece.name or "exp_avg" in piece.name


def _gathered(path: Path, pieces: list[Piece]) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += read_range(path / piece.file, piece.position, min(piece.bytes, _AT_MOST - len(data)))
    return bytes(data)


def _rounded(data: bytes) -> bytes:
    """fp32 to the nearest bf16, ties to even."""
    bits = np.frombuffer(data, "<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _measure(coder: Coder, data: bytes) -> Figures:
    packing, unpacking, packed = 0.0, 0.0, 0
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        began = time.process_time()
        small = coder[0](chunk)
        middle = time.process_time()
        back = coder[1](small, len(chunk))
        packing, unpacking = packing + middle - began, unpacking + time.process_time() - middle
        packed += len(small)
        if bytes(back) != chunk:
            raise ValueError("the bytes that came back are others")
    return {"ratio": len(data) / packed, "packing": len(data) / packing, "unpacking": len(data) / unpacking}


def _ours(width: int) -> Coder:
    codec = compression.CODECS[width]
    return lambda data: compression.compress(data, width), lambda small, n: compression.decode(
        Encoded("", codec, small), n
    )


def _zipnn(width: int) -> Coder:
    try:
        from zipnn import ZipNN
    except ImportError:
        raise ValueError("ZipNN is not installed, the peer of this bench: pip install zipnn") from None
    coder: Any = ZipNN(bytearray_dtype="bfloat16" if width == 2 else "float32", threads=1)
    return lambda data: coder.compress(bytearray(data)), lambda small, _: coder.decompress(small)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
