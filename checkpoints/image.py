"""One writer's file as it lies in memory first, and its way to a disk. No torch.

An image is the file, byte for byte: pieces at multiples of 4 KiB, zeros between them. It is written in
large aligned parts past the page cache (O_DIRECT) where the file system takes that. Measured on ext4 with
2 cores, 512 MiB, until durable: 1.2-1.9 GB/s and 0.01-0.02 CPU seconds, beside 0.15-0.74 GB/s and 0.2-1.9
CPU seconds through the page cache with fsync.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crc32c import crc32c

from checkpoints.attempts import write_durably, writer_name
from checkpoints.formats import stored_bytes
from checkpoints.manifest import ALIGNMENT, Manifest, Piece, aligned, block_ranges
from checkpoints.ranges import Shape

PART = 16 << 20  # bytes per write: 4 MiB cost 5 % of the rate, 64 MiB gained nothing
IN_FLIGHT = 2  # parts handed to the file system at a time


def _no_beat() -> None:
    return


@dataclass(frozen=True)
class Place:
    """A box of a global tensor, and where in an image its row-major bytes lie."""

    name: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    dtype: str
    position: int

    @property
    def bytes(self) -> int:
        return stored_bytes(self.dtype, self.offset, self.shape)

    @property
    def end(self) -> int:
        return self.position + self.bytes


def places_from(raw: Iterable[dict[str, Any]]) -> list[Place]:
    """Out of JSON, where `vars(place)` went in."""
    fields: list[dict[str, Any]] = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in place.items()} for place in raw
    ]
    return [Place(**place) for place in fields]


def size_of(places: Sequence[Place]) -> int:
    """Bytes of the file; its image needs the next multiple of ALIGNMENT."""
    return places[-1].end if places else 0


def write_image(
    attempt: Path,
    writer: int,
    places: Sequence[Place],
    image: memoryview,
    facts: Mapping[str, Any],
    beat: Callable[[], None] = _no_beat,
) -> int:
    """Write one writer's file and its receipt, durably; returns the file's bytes.

    `image` reaches to a multiple of ALIGNMENT at least, zeros where no place is. `beat` is called whenever
    a part is written. Raises OSError (no space left, for instance): the partial file is removed
    then, and there is no receipt.
    """
    path = attempt / f"{writer_name(writer)}.bin"
    size = size_of(places)
    with ThreadPoolExecutor(1) as beside:  # 16 GB/s, and without Python's lock: it costs no time here
        checksums = beside.submit(lambda: [_checksums(place, image) for place in places])
        write_file(path, image[: aligned(size)], size, beat)
        pieces = tuple(
            Piece(**vars(place), file=path.name, checksums=listed)
            for place, listed in zip(places, checksums.result(), strict=True)
        )
    receipt = Manifest("receipt", pieces, {path.name: size}, facts)
    write_durably(attempt / f"{writer_name(writer)}.json", receipt.to_json())
    return size


def write_file(path: Path, image: memoryview, size: int, beat: Callable[[], None] = _no_beat) -> None:
    """Write the first `size` bytes of an aligned image into a new file, durably.

    Raises FileExistsError, or another OSError, and then there is no file.
    """
    with _new_file(path) as file, ThreadPoolExecutor(IN_FLIGHT) as pool:

        def write(start: int) -> None:
            _write_all(file, image[start : start + PART], start)
            beat()

        for _ in pool.map(write, range(0, len(image), PART)):
            pass
        os.ftruncate(file, size)  # what was written beyond are the zeros up to a multiple of ALIGNMENT
        os.fsync(file)


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _bypass_cache(file, True)  # not in open(), which would leave a file where it is refused
        yield file
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(file)


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        try:
            written = os.pwrite(file, data, position)
        except OSError as error:
            # Bypassing may be refused here first; and so is going on from within a block, after a write
            # that a full disk cut short.
            if error.errno != errno.EINVAL:
                raise
            _bypass_cache(file, False)
            written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def _bypass_cache(file: int, wanted: bool) -> None:
    """Switch O_DIRECT, where the file system knows it."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)


def _checksums(place: Place, image: memoryview) -> tuple[int, ...]:
    ranges = block_ranges(place.bytes)
    return tuple(crc32c(image[place.position + start : place.position + stop]) for start, stop in ranges)


def pack(boxes: Iterable[tuple[str, Shape, Shape, Shape, str]]) -> list[Place]:
    """Places one after the other for (name, global shape, offset, shape, dtype)."""
    places: list[Place] = []
    for box in boxes:
        places.append(Place(*box, position=aligned(size_of(places))))
    return places


def room_for(places: Sequence[Place]) -> int:
    """Bytes of memory that an image takes."""
    return max(aligned(size_of(places)), ALIGNMENT)
