"""A manifest reads back as it was written, or is refused with one clear line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import manifest as form
from checkpoints.formats import DTYPES, stored_bytes
from checkpoints.manifest import MANIFEST, Damaged, Manifest, Piece

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
json_facts = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
)


def packed(tensors: list[tuple[str, tuple[int, ...], str]], file: str) -> tuple[list[Piece], int]:
    """Pieces of whole tensors, one after the other, and the size of their file."""
    pieces, end = [], 0
    for name, shape, dtype in tensors:
        size = stored_bytes(dtype, (0,) * len(shape), shape)
        sums = tuple(range(-(-size // form.BLOCK)))
        position = form.aligned(end)
        pieces.append(Piece(name, shape, (0,) * len(shape), shape, dtype, file, position, sums))
        end = position + size
    return pieces, end


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    pieces: list[Piece] = []
    files = {}
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    for number in range(draw(st.integers(0, 3))):
        names = st.tuples(st.text(min_size=1, max_size=4), shapes, st.sampled_from(sorted(DTYPES)))
        tensors = draw(st.lists(names, max_size=3))
        file = f"writer-{number:05d}.bin"
        found, files[file] = packed([(f"{number}{i}{n}", s, d) for i, (n, s, d) in enumerate(tensors)], file)
        pieces += found
    kind = draw(st.sampled_from(form.KINDS))
    facts = draw(json_facts) | ({"step": draw(st.integers(0, 99))} if kind == "checkpoint" else {})
    return Manifest(kind, tuple(pieces), files, facts)


def example() -> Manifest:
    pieces, size = packed([("weight", (4, 6), "float32"), ("step", (), "int64")], "writer-00000.bin")
    return Manifest("checkpoint", tuple(pieces), {"writer-00000.bin": size}, {"step": 7, "note": "a"})


def sealed(raw: Any) -> str:
    """The text of a manifest that a careful forger would write."""
    if isinstance(raw, dict):
        body = {key: value for key, value in raw.items() if key != "crc32c"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        raw = {**body, "crc32c": crc32c(text.encode())}
    return json.dumps(raw, sort_keys=True, separators=(",", ":")) + "\n"


def refusal(text: str) -> str | None:
    """Why it is refused, in one line; any exception but ValueError fails the test."""
    reason = None
    try:
        Manifest.from_json(text)
    except ValueError as error:
        reason = str(error)
    assert reason is None or ("\n" not in reason and 10 < len(reason) < 400)
    return reason


@given(manifests())
def test_reads_back_as_written(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.sha256 == manifest.sha256


def test_is_one_line_of_json_with_known_fields() -> None:
    text = example().to_json()
    assert text.count("\n") == 1
    raw = json.loads(text)
    assert sorted(raw) == ["crc32c", "facts", "files", "kind", "pieces"]
    assert raw["files"] == {"writer-00000.bin": 4096 + 8}
    assert raw["pieces"][1] == {
        "name": "step", "global_shape": [], "offset": [], "shape": [], "dtype": "int64",
        "file": "writer-00000.bin", "position": 4096, "checksums": [0],
    }  # fmt: skip
    assert example().bytes == 4104


def test_every_flipped_bit_is_noticed() -> None:
    good = example().to_json().encode()
    for position in range(len(good)):
        for bit in range(7):  # the eighth makes it no ASCII: see below
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            assert refusal(bad.decode("ascii")), (position, bit)


def test_a_flipped_bit_on_disk_is_damage(tmp_path: Path) -> None:
    good = example().to_json().encode()
    (tmp_path / MANIFEST).write_bytes(good)
    assert form.load(tmp_path) == example()
    for flip in (1, 128):
        (tmp_path / MANIFEST).write_bytes(bytes([*good[:50], good[50] ^ flip, *good[51:]]))
        with pytest.raises(Damaged) as caught:
            form.load(tmp_path)
        assert caught.value.path == tmp_path
        assert str(caught.value) == f"{tmp_path}: {caught.value.reason}"


@given(st.integers(0, 10_000))
def test_every_truncation_is_noticed(length: int) -> None:
    text = example().to_json()
    if length < len(text):
        assert refusal(text[:length])


@given(st.text() | st.binary().map(lambda b: b.decode("latin1")) | json_values.map(sealed))
def test_other_text_is_refused(text: str) -> None:
    assert refusal(text)


def places(raw: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@given(st.data(), json_values | st.integers(-(2**70), 2**70))
def test_a_forged_manifest_is_refused_or_makes_sense(data: st.DataObject, value: Any) -> None:
    raw = json.loads(example().to_json())
    place = data.draw(st.sampled_from([p for p in places(raw) if p]))
    *parents, last = place
    holder = raw
    for key in parents:
        holder = holder[key]
    holder[last] = value
    text = sealed(raw)
    if refusal(text) is None:
        assert Manifest.from_json(text).to_json() == text
        assert place[0] in ("facts", "pieces", "crc32c")  # names and checksums may be anything


def piece_with(**changes: Any) -> Any:
    def change(raw: Any) -> None:
        raw["pieces"][0].update(changes)

    return change


REFUSED = {
    "outside its directory": (lambda raw: raw.update(files={"../x": 4104}), "not a plain file name"),
    "absolute": (lambda raw: raw.update(files={"/etc/passwd": 4104}), "not a plain file name"),
    "hidden": (lambda raw: raw.update(files={".x": 4104}), "not a plain file name"),
    "unlisted file": (piece_with(file="other.bin"), "its file is not listed"),
    "kind": (lambda raw: raw.update(kind="pickle"), "kind must be one of checkpoint"),
    "extra field": (lambda raw: raw.update(version=1), "must have exactly"),
    "no step": (lambda raw: raw.update(facts={}), "must tell its step"),
    "size": (lambda raw: raw["files"].update({"writer-00000.bin": 1 << 63}), "not a number of bytes"),
    "gap": (lambda raw: raw["files"].update({"writer-00000.bin": 1 << 40}), "its tensors fill 4104"),
    "dtype": (piece_with(dtype="object"), "dtype must be one of float64"),
    "dtype list": (piece_with(dtype=[]), "dtype is not a str"),
    "beyond": (piece_with(offset=[0, 1]), "reaches beyond its global shape"),
    "dimensions": (piece_with(offset=[0]), "differ in length"),
    "negative": (piece_with(offset=[-1, 0]), "not a list of whole numbers"),
    "fraction": (piece_with(shape=[4.0, 6]), "not a list of whole numbers"),
    "truth": (piece_with(shape=[True, 6]), "not a list of whole numbers"),
    "absurd": (piece_with(global_shape=[1 << 61, 6]), "absurdly large"),
    "overlap": (lambda raw: raw["pieces"][1].update(position=0), "not at position"),
    "unaligned": (lambda raw: raw["pieces"][1].update(position=96), "bad position"),
    "checksums": (piece_with(checksums=[]), "wrong number of checksums"),
    "wide checksum": (piece_with(checksums=[1 << 32]), "more than 32 bits"),
    "nameless": (piece_with(name=""), "without a name"),
    "disagreement": (piece_with(name="step"), "differ in global shape or dtype"),
    "not a number": (lambda raw: raw["facts"].update(loss=float("nan")), "not JSON compliant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_is_wrong(case: str) -> None:
    change, message = REFUSED[case]
    raw = json.loads(example().to_json())
    change(raw)
    assert message in (refusal(sealed(raw)) or "accepted")


def test_a_wrong_checksum_of_the_manifest_is_told_as_such() -> None:
    text = example().to_json().replace('"step":7', '"step":8')
    assert refusal(text) == "the manifest does not match its own checksum"


@pytest.mark.parametrize("depth", [500, 5_000, 100_000])
def test_nesting_is_no_crash(depth: int) -> None:
    text = '{"facts":' + "[" * depth + "]" * depth + "}"
    assert refusal(text)
    raw = example().to_json().replace('"note":"a"', '"note":' + "[" * depth + "]" * depth)
    assert refusal(raw)


def test_load_says_what_is_not_committed_and_what_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        form.load(tmp_path)
    (tmp_path / MANIFEST).write_text(example().to_json())
    with patch.object(form, "LARGEST_MANIFEST", 100), pytest.raises(Damaged, match="at most 100 are read"):
        form.load(tmp_path)


def test_files_must_be_there_regular_and_whole(tmp_path: Path) -> None:
    manifest = example()
    file = tmp_path / "writer-00000.bin"
    with pytest.raises(Damaged, match=r"writer-00000.bin is missing"):
        form.check_files(tmp_path, manifest)
    file.write_bytes(bytes(4103))
    with pytest.raises(Damaged, match=r"has 4103 bytes, not 4104"):
        form.check_files(tmp_path, manifest)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match="not a regular file"):
        form.check_files(tmp_path, manifest)


def test_a_file_that_cannot_be_looked_at_is_damage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Damaged, match=r"writer-00000.bin cannot be read: Not a directory"):
        form.check_files(tmp_path / "file", example())


def test_damage_travels_between_processes() -> None:
    damage = pickle.loads(pickle.dumps(Damaged(Path("/a/b"), "is wet")))
    assert (damage.path, damage.reason, str(damage)) == (Path("/a/b"), "is wet", "/a/b: is wet")


@given(st.integers(0, 1 << 28))
def test_blocks_cover_all_bytes_in_order(size: int) -> None:
    blocks = form.block_ranges(size)
    assert sum(stop - start for start, stop in blocks) == size
    assert all(0 < stop - start <= form.BLOCK for start, stop in blocks)
    assert [start for start, _ in blocks] == [number * form.BLOCK for number in range(len(blocks))]


def test_the_controller_reads_manifests_without_torch() -> None:
    code = "import sys, checkpoints.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
