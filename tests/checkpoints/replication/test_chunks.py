"""Every byte of a checkpoint is in exactly one chunk, and a chunk knows its own bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.manifest import ALIGNMENT, Manifest, Piece, aligned, load
from checkpoints.replication.chunks import Chunk, cut, name_of
from tests.checkpoints.samples import checkpoint, weights

SIZES = st.lists(st.lists(st.integers(0, 40_000), max_size=12), min_size=1, max_size=3)


def manifest_of(sizes: list[list[int]]) -> Manifest:
    """One file per list, its tensors of so many bytes."""
    pieces, files = [], {}
    for number, row in enumerate(sizes):
        file, end = f"f{number}", 0
        for index, size in enumerate(row):
            name, sums = f"{number}.{index}", (7,) * (size > 0)
            pieces.append(Piece(name, (size,), (0,), (size,), "uint8", file, aligned(end), sums))
            end = aligned(end) + size
        files[file] = end
    return Manifest("update", tuple(pieces), files, {})


@given(SIZES, st.integers(1, 100_000))
def test_chunks_cover_every_byte_once_and_keep_to_the_size(sizes: list[list[int]], largest: int) -> None:
    manifest = manifest_of(sizes)
    chunks = cut(manifest, largest)
    for file, size in manifest.files.items():
        end = 0
        for chunk in (c for c in chunks if c.file == file):
            assert chunk.position == end
            end += chunk.size
        assert end == size
    assert sorted(b.position for c in chunks for b in c.blocks) == sorted(
        p.position for p in manifest.pieces if p.bytes
    )
    for chunk in chunks:
        blocks = chunk.blocks
        assert len(blocks) == 1 or chunk.blocks_end <= largest
        assert chunk.size < chunk.blocks_end + ALIGNMENT


@given(SIZES, st.integers(1, 100_000))
def test_two_neighbours_do_not_fit_into_one(sizes: list[list[int]], largest: int) -> None:
    chunks = cut(manifest_of(sizes), largest)
    for first, second in itertools.pairwise(chunks):
        if first.file == second.file:
            assert first.size + second.blocks[0].size > largest


@pytest.fixture
def sample(tmp_path: Path) -> tuple[Chunk, bytes]:
    """A chunk of three tensors, two of them with padding behind."""
    tensors = {
        name: weights(n, seed) for seed, (name, n) in enumerate({"a": 1500, "b": 10, "c": 2000}.items())
    }
    path = checkpoint(tmp_path, tensors, writers=1)
    (chunk,) = cut(load(path))
    return chunk, (path / chunk.file).read_bytes()


def test_a_chunk_knows_its_bytes_to_the_last_bit_of_padding(sample: tuple[Chunk, bytes]) -> None:
    chunk, data = sample
    assert chunk.flaw(data) is None
    for position in [0, 5999, 6000, ALIGNMENT * 2 - 1, ALIGNMENT * 2, ALIGNMENT * 2 + 40, len(data) - 1]:
        wrong = bytearray(data)
        wrong[position] ^= 1
        assert chunk.flaw(wrong), position
    assert "bytes from 0 on" in str(chunk.flaw(data[:-1]))
    assert "padding after byte 6000" in str(chunk.flaw(data[:6000] + b"x" + data[6001:]))


def test_the_width_is_that_of_most_bytes(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(1000, "<u2"), "b": weights(400), "c": np.zeros(9, "<i8")}
    (chunk,) = cut(load(checkpoint(tmp_path, tensors, writers=1)))
    assert chunk.width == 2


def test_names_are_blake3() -> None:
    # the official test vectors' first: BLAKE3 of nothing
    assert name_of(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
