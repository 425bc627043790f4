"""Reads a piece's blocks and verifies them: the one place where stored bytes become trusted. No torch."""

from __future__ import annotations

from pathlib import Path

from crc32c import crc32c

from checkpoints.manifest import Damaged, Piece, block_ranges


def read_block(directory: Path, piece: Piece, index: int, buffer: bytearray) -> memoryview:
    """One block of a piece, verified; it lies in `buffer`, which grows as needed. Raises Damaged."""
    start, stop = block_ranges(piece.bytes)[index]
    data = read_bytes(directory, piece.file, piece.position + start, stop - start, buffer)
    if (found := crc32c(data)) != piece.checksums[index]:
        where = f"{piece.file}: bytes {piece.position + start} to {piece.position + stop}"
        listed = piece.checksums[index]
        raise Damaged(directory, f"{where} ({piece.name}) have crc32c {found:08x}, not {listed:08x}")
    return data


def verify_piece(directory: Path, piece: Piece) -> None:
    """Read all of a piece, a block at a time. Raises Damaged."""
    buffer = bytearray()
    for index in range(len(piece.checksums)):
        read_block(directory, piece, index, buffer)


def read_bytes(directory: Path, file: str, position: int, count: int, buffer: bytearray) -> memoryview:
    """Bytes of a file, in `buffer` until the next call that uses it. Raises Damaged."""
    if len(buffer) < count:
        buffer.extend(bytes(count - len(buffer)))
    view = memoryview(buffer)[:count]
    try:
        with (directory / file).open("rb") as stream:
            stream.seek(position)
            got = stream.readinto(view)
    except OSError as error:
        raise Damaged(directory, f"{file} cannot be read: {error.strerror}") from error
    if got != count:
        raise Damaged(directory, f"{file} ends after byte {position + got}")
    return view
