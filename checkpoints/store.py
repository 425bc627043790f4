"""What one writer adds to an attempt (checkpoints/attempts.py): its shards in one file, and a receipt."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from crc32c import crc32c

from checkpoints import manifest as form
from checkpoints.attempts import write_durably, writer_name
from checkpoints.manifest import Manifest, Piece
from checkpoints.reader import Shard, dtype_name


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
    flat = shard.tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data
    end = stream.tell()
    position = form.aligned(end)
    stream.write(bytes(position - end))
    checksums = []
    for start, stop in form.block_ranges(data.nbytes):
        checksums.append(crc32c(data[start:stop]))
        stream.write(data[start:stop])
    shape, dtype = tuple(shard.tensor.shape), dtype_name(flat.dtype)
    return Piece(shard.name, shard.global_shape, shard.offset, shape, dtype, file, position, tuple(checksums))
