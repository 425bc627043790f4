"""A checkpoint cut into chunks: what travels between sites, is named by its hash, and is sent again alone.

The cut follows from the manifest, so that both ends of a link agree on it without a word. A chunk is one
range of one file and holds whole blocks only: the manifest's crc32c tell the source whether it still has what
was written, and the receiver what it can keep from a transfer that was cut off. Its name is BLAKE3 (4.7 GB/s
on one core here, sha256 1.8): 32 bits of CRC find damage, but are no identity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3
from crc32c import crc32c

from checkpoints.formats import ITEM_BYTES
from checkpoints.manifest import BLOCK, Manifest, block_ranges

LARGEST = BLOCK  # bytes: two neighbours have more than this together, so that chunks have 32 MiB on average

Fingerprint = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Block:
    """What one checksum of the manifest covers; `position` is in the file, bytes."""

    position: int
    size: int
    crc32c: int
    width: int  # bytes of an item of its tensor


@dataclass(frozen=True)
class Chunk:
    """A range of a file: blocks, and the zeros between them and behind the last one."""

    file: str
    position: int
    size: int
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        """Bytes of the items that fill most of it."""
        filled: dict[int, int] = defaultdict(int)
        for block in self.blocks:
            filled[block.width] += block.size
        return max(filled, key=lambda width: filled[width])

    @property
    def blocks_end(self) -> int:
        """Bytes to the end of its last block: what follows is padding."""
        return self.blocks[-1].position + self.blocks[-1].size - self.position

    @property
    def fingerprint(self) -> Fingerprint:
        """Chunks that differ in it differ; those that do not are most likely equal."""
        return tuple((b.position - self.position, b.size, b.crc32c) for b in self.blocks)

    def flaw(self, data: bytes | bytearray | memoryview) -> str | None:
        """What is wrong with bytes that should be this chunk; None where nothing is, padding included."""
        if len(data) != self.size:
            return f"{self.file}: {len(data)} bytes from {self.position} on, not {self.size}"
        view, end = memoryview(data), 0
        for block in self.blocks:
            start = block.position - self.position
            if _is_marked(view[end:start]):
                return self._marked(end)
            end = start + block.size
            if (found := crc32c(view[start:end])) != block.crc32c:
                where = f"{self.file}: bytes {block.position} to {block.position + block.size}"
                return f"{where} have crc32c {found:08x}, not {block.crc32c:08x}"
        return self._marked(end) if _is_marked(view[end:]) else None

    def _marked(self, end: int) -> str:
        return f"{self.file}: the padding after byte {self.position + end} is not zero"


def cut(manifest: Manifest, largest: int = LARGEST) -> tuple[Chunk, ...]:
    """All chunks of a manifest, in the order of files and positions; they cover every byte of every file."""
    blocks: dict[str, list[Block]] = {name: [] for name in sorted(manifest.files)}
    for piece in manifest.pieces:
        width = ITEM_BYTES.get(piece.dtype, 1)  # codes of a quantised piece are bytes
        for (start, stop), checksum in zip(block_ranges(piece.bytes), piece.checksums, strict=True):
            blocks[piece.file].append(Block(piece.position + start, stop - start, checksum, width))
    return tuple(
        chunk for name in blocks for chunk in _of_file(name, manifest.files[name], blocks[name], largest)
    )


def name_of(data: bytes | bytearray | memoryview) -> str:
    """The name of a chunk: BLAKE3, 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def _is_marked(padding: memoryview) -> bool:
    return padding.tobytes().strip(b"\0") != b""


def _of_file(name: str, size: int, blocks: list[Block], largest: int) -> Iterator[Chunk]:
    groups: list[list[Block]] = []
    for block in sorted(blocks, key=lambda block: block.position):
        if groups and block.position + block.size - groups[-1][0].position <= largest:
            groups[-1].append(block)
        else:
            groups.append([block])
    starts = [group[0].position for group in groups]
    for group, start, stop in zip(groups, starts, [*starts, size][1:], strict=True):
        yield Chunk(name, start, stop - start, tuple(group))
