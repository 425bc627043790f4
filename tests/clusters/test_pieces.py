"""Files in pieces: whatever the sizes, one bad byte is found, and in its piece; what changed is not known."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.pieces import Known, StagedFile, is_good, measure


@given(st.binary(max_size=200), st.integers(1, 64))
def test_pieces_cover_a_file_once(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, piece: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "measured"
    file.write_bytes(content)
    told = measure(file, "data/x", piece)
    assert (told.size, told.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    ranges = [told.range(number) for number in range(len(told.pieces))]
    assert b"".join(content[first : first + length] for first, length in ranges) == content
    assert all(is_good(file, told, number) for number in range(len(told.pieces)))
    assert StagedFile.from_json(json.loads(json.dumps(told.to_json()))) == told


@given(st.binary(min_size=1, max_size=200), st.integers(1, 64), st.data())
def test_one_flipped_bit_is_found_in_its_piece_alone(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, piece: int, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "flipped"
    file.write_bytes(content)
    told = measure(file, "x", piece)
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(flipped)
    bad = [number for number in range(len(told.pieces)) if not is_good(file, told, number)]
    assert bad == [at // piece]


def test_what_is_known_outlives_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    known = Known(tmp_path / "known.json")
    assert known.facts(tmp_path / "file") == {}
    known.remember(tmp_path / "file", sha256="s")
    known.save()
    assert Known(tmp_path / "known.json").facts(tmp_path / "file") == {"sha256": "s"}


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def grown(file: Path) -> None:
    file.write_bytes(b"xy")
    os.utime(file, ns=(0, 0))


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"y")
    os.utime(other, ns=(0, 0))
    other.replace(file)


@pytest.mark.parametrize("change", [touched, grown, replaced])
def test_a_file_that_has_changed_is_not_known(tmp_path: Path, change: object) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    os.utime(file, ns=(0, 0))
    known = Known(tmp_path / "known.json")
    known.remember(file, sha256="s")
    assert known.facts(file)
    change(file)  # type: ignore[operator]
    assert known.facts(file) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}'])
def test_a_memory_that_cannot_be_read_begins_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "known.json").write_text(text)
    (tmp_path / "x").touch()
    assert Known(tmp_path / "known.json").facts(tmp_path / "x") == {}


def test_a_memory_that_has_not_changed_is_not_written(tmp_path: Path) -> None:
    Known(tmp_path / "known.json").save()
    assert not (tmp_path / "known.json").exists()
