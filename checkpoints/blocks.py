"""Reads a piece's blocks and verifies them: the one place where stored bytes become trusted. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from crc32c import crc32c

from checkpoints.manifest import Damaged, Manifest, Piece, aligned, block_ranges, check_files


class Blocks:
    """Verified bytes of one directory's pieces; a block at a time lies in memory."""

    def __init__(self, directory: Path, copies: Sequence[Path | Blocks] = ()) -> None:
        """Some of the files may be in `copies` as well, directories that are read first, as far as they are
        sound. What of them is not is in `bad_copies`."""
        self.directory = directory
        self.copies = [Blocks(copy) if isinstance(copy, Path) else copy for copy in copies]
        self.bad_copies: dict[Path, Damaged] = {}
        self._buffer = bytearray()

    def read(self, piece: Piece, index: int) -> memoryview:
        """A block of a piece; valid until the next call. Raises Damaged."""
        for copy in self.copies:
            path = copy.directory / piece.file
            if path not in self.bad_copies and copy.has(piece.file):
                try:
                    return copy.read(piece, index)
                except Damaged as damage:
                    self.bad_copies[path] = damage
        return self._read(piece, index)

    def _read(self, piece: Piece, index: int) -> memoryview:
        start, stop = block_ranges(piece.bytes)[index]
        data = self._bytes(piece.file, piece.position + start, stop - start)
        if (found := crc32c(data)) != piece.checksums[index]:
            where = f"{piece.file}: bytes {piece.position + start} to {piece.position + stop}"
            listed = piece.checksums[index]
            raise Damaged(self.directory, f"{where} ({piece.name}) have crc32c {found:08x}, not {listed:08x}")
        return data

    def check_padding(self, piece: Piece, file_size: int) -> None:
        """The bytes between a piece and the next belong to no block, and are zero. Raises Damaged."""
        end = piece.position + piece.bytes
        if any(self._bytes(piece.file, end, min(aligned(end), file_size) - end)):
            raise Damaged(self.directory, f"{piece.file}: the padding after byte {end} is not zero")

    def has(self, file: str) -> bool:
        return (self.directory / file).exists()

    def fill(self, file: str, position: int, view: memoryview) -> int:
        """How many bytes there were. Raises OSError. With `has`, what a place other than a directory has of
        its own."""
        with (self.directory / file).open("rb") as stream:
            stream.seek(position)
            return stream.readinto(view)

    def _bytes(self, file: str, position: int, count: int) -> memoryview:
        if len(self._buffer) < count:
            self._buffer = bytearray(count)  # never resized: a reader may still look at the old one
        view = memoryview(self._buffer)[:count]
        try:
            got = self.fill(file, position, view)
        except OSError as error:
            raise Damaged(self.directory, f"{file} cannot be read: {error.strerror or error}") from error
        if got != count:
            raise Damaged(self.directory, f"{file} ends after byte {position + got}")
        return view


def verify(directory: Path, manifest: Manifest) -> None:
    """Read every byte that a manifest describes, padding included. Raises Damaged."""
    for damage in damages(directory, manifest):
        raise damage


def damages(
    directory: Path, manifest: Manifest, was_read: Callable[[int], object] = lambda _: None
) -> Iterator[Damaged]:
    """Every block or padding that is not what was written, after reading all; `was_read` is called with the
    bytes of each piece. A file that is missing or of another size is the only damage told then."""
    try:
        check_files(directory, manifest)
    except Damaged as damage:
        yield damage
        return
    blocks = Blocks(directory)
    for piece in manifest.pieces:
        for index in range(len(piece.checksums)):
            try:
                blocks.read(piece, index)
            except Damaged as damage:
                yield damage
        try:
            blocks.check_padding(piece, manifest.files[piece.file])
        except Damaged as damage:
            yield damage
        was_read(piece.bytes)
