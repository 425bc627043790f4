"""What one writer adds to an attempt (checkpoints/attempts.py): its shards in one file, and a receipt."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from crc32c import crc32c

from checkpoints import manifest as form
from checkpoints.attempts import write_durably, writer_name
from checkpoints.manifest import Manifest, Piece
from checkpoints.reader import Shard


def write_shards(attempt: Path, writer: int, shards: Iterable[Shard]) -> int:
    """Write one writer's part and its receipt, durably; returns the bytes of tensors and padding.

    Shards are taken one at a time. Raises OSError (no space left, for instance): the partial file is
    removed, and the attempt stays without a receipt and cannot be committed.
    """
    path = attempt / f"{writer_name(writer)}.bin"
    with path.open("xb") as stream:
        try:
            pieces = tuple(_append(stream, path.name, shard) for shard in shards)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        except OSError:
            path.unlink()
            raise
    receipt = Manifest("receipt", pieces, {path.name: size}, {})
    write_durably(attempt / f"{writer_name(writer)}.json", receipt.to_json())
    return size


def _append(stream: BinaryIO, file: str, shard: Shard) -> Piece:
    data = shard.stored().numpy().data
    end = stream.tell()
    position = form.aligned(end)
    stream.write(bytes(position - end))
    checksums = []
    for start, stop in form.block_ranges(data.nbytes):
        checksums.append(crc32c(data[start:stop]))
        stream.write(data[start:stop])
    shape = tuple(shard.tensor.shape)
    where = (file, position, tuple(checksums))
    return Piece(shard.name, shard.global_shape, shard.offset, shape, shard.dtype, *where)
