"""A writer's file: laid out as memory, written past the cache where that is possible, or not there at all."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import image as module
from checkpoints.attempts import begin, commit
from checkpoints.image import PART, Place, pack, places_from, room_for, size_of, write_file, write_image
from checkpoints.manifest import ALIGNMENT, BLOCK, aligned
from checkpoints.reader import Reader, Shard

DTYPES = st.sampled_from(["float32", "bfloat16", "uint8", "int64", "bool"])
BOXES = st.tuples(
    st.text(min_size=1, max_size=3), st.lists(st.integers(0, 40), max_size=3).map(tuple), DTYPES
)


def memory(size: int) -> memoryview:
    """Anonymous pages: aligned, as O_DIRECT wants them, and with bytes that differ."""
    pages = mmap.mmap(-1, max(aligned(size), ALIGNMENT))
    pages[:size] = (bytes(range(1, 252)) * (size // 251 + 1))[:size]
    return memoryview(pages)


@given(st.lists(BOXES, max_size=6))
def test_places_lie_one_after_the_other(boxes: list[tuple[str, tuple[int, ...], str]]) -> None:
    places = pack((name, shape, tuple(0 for _ in shape), shape, dtype) for name, shape, dtype in boxes)
    end = 0
    for place in places:
        assert (place.position, place.position % ALIGNMENT) == (aligned(end), 0)
        end = place.position + place.bytes
    assert size_of(places) == end
    assert room_for(places) >= end
    assert room_for(places) % ALIGNMENT == 0
    assert places_from([{**vars(place), "shape": list(place.shape)} for place in places]) == places


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, PART, PART + 1, 3 * PART + 4097])
def test_a_file_is_as_long_as_it_was_to_be(tmp_path: Path, size: int) -> None:
    image = memory(size)
    write_file(tmp_path / "x", image[: aligned(size)], size)
    assert (tmp_path / "x").read_bytes() == bytes(image[:size])


def test_the_cache_is_bypassed_where_the_file_system_knows_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bool] = set()
    pwrite = os.pwrite

    def watched(file: int, data: memoryview, position: int) -> int:
        seen.add(bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT))
        return pwrite(file, data, position)

    monkeypatch.setattr(os, "pwrite", watched)
    write_file(tmp_path / "x", memory(5000)[:8192], 5000)
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(probe, fcntl.F_SETFL, os.O_DIRECT)
        possible = True
    except OSError:
        possible = False
    finally:
        os.close(probe)
    assert seen == {possible}


def test_a_file_system_that_refuses_aligned_writes_gets_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    pwrite = os.pwrite

    def strict(file: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(position)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(file, data[: 1 << 20], position)  # and it writes less than it was asked to

    monkeypatch.setattr(os, "pwrite", strict)
    size = 2 * PART + 5
    image = memory(size)
    write_file(tmp_path / "x", image[: aligned(size)], size)
    assert refused
    assert (tmp_path / "x").read_bytes() == bytes(image[:size])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pwrite = os.pwrite

    def full(file: int, data: memoryview, position: int) -> int:
        if position >= PART:
            raise OSError(number, os.strerror(number))
        return pwrite(file, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    places = [Place("t", (2 * PART,), (0,), (2 * PART,), "uint8", 0)]
    with pytest.raises(OSError, match=os.strerror(number)):
        write_image(tmp_path, 0, places, memory(2 * PART), {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_written_twice(tmp_path: Path) -> None:
    write_file(tmp_path / "x", memory(10)[:4096], 10)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "x", memory(20)[:4096], 20)
    assert (tmp_path / "x").stat().st_size == 10


def test_beats_tell_of_progress(tmp_path: Path) -> None:
    beats: list[int] = []
    write_file(tmp_path / "x", memory(3 * PART), 3 * PART, lambda: beats.append(1))
    assert len(beats) == 3


def test_a_piece_of_several_blocks_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = BLOCK // 1024 // 4 + 3
    places = pack([("a", (3,), (0,), (3,), "uint8"), ("b", (rows, 1024), (0, 0), (rows, 1024), "float32")])
    image = memory(size_of(places))
    for start in range(places[0].end, places[1].position):
        image[start] = 0  # padding
    attempt = begin(tmp_path, "a")
    assert write_image(attempt, 0, places, image, {}) == size_of(places)
    commit(attempt, 1, "update", {})
    found = torch.empty(rows, 1024)
    reader = Reader(attempt)
    reader.verify()
    reader.read(Shard("b", (rows, 1024), (0, 0), found))
    expected = torch.frombuffer(image, dtype=torch.float32, offset=places[1].position, count=rows * 1024)
    assert found.reshape(-1).view(torch.int32).equal(expected.view(torch.int32))


def test_parts_are_aligned() -> None:
    assert module.PART % ALIGNMENT == 0
