"""What a checkpoint or an outer update is: tensors cut into pieces, pieces in flat files, one manifest.

`manifest.json` is one line of canonical JSON (sorted keys, ASCII) with the fields

    kind      "checkpoint", "update", or "receipt" (what one writer wrote, before the commit)
    files     {name: bytes}: plain file names beside the manifest, nothing else is ever opened
    pieces    each a box of a global tensor: its name, global_shape, offset, shape, dtype, and where its
              bytes (checkpoints/formats.py) lie: file, position; crc32c of every 64 MiB block of them
    facts     what the writer wants to remember: step, run, round, ...
    crc32c    of the canonical JSON of all the rest

Text that is not canonical is refused, so a flipped bit anywhere in it is noticed. No torch: the
controller reads manifests as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from crc32c import crc32c

from checkpoints.formats import DTYPES, stored_bytes
from checkpoints.ranges import Box, Shape

MANIFEST = "manifest.json"
KINDS = ("checkpoint", "update", "receipt")
ALIGNMENT = 4096  # bytes: pieces begin at multiples, so that they can be mapped or read with O_DIRECT
BLOCK = 64 << 20  # bytes per checksum: a reader holds one block at a time
LARGEST_MANIFEST = 256 << 20  # bytes; about a million pieces
LARGEST_SIZE = 1 << 62  # elements or bytes; files cannot be larger than 2^63 - 1

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class Damaged(ValueError):
    """A checkpoint or update is not what its writer wrote, or cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, and where its bytes lie. Raises ValueError when it contradicts itself."""

    name: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    dtype: str
    file: str
    position: int
    checksums: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(self.name != "", "a tensor without a name")
        what = f"tensor {self.name[:200]!r}"
        for field in ("global_shape", "offset", "shape", "checksums"):
            _require(_are_sizes(getattr(self, field)), f"{what}: {field} is not a list of whole numbers")
        _require(self.dtype in DTYPES, f"{what}: dtype must be one of {', '.join(DTYPES)}")
        _require(
            len(self.global_shape) == len(self.offset) == len(self.shape),
            f"{what}: shapes and offset differ in length",
        )
        ends = zip(self.offset, self.shape, self.global_shape, strict=True)
        _require(all(o + s <= g for o, s, g in ends), f"{what}: a piece reaches beyond its global shape")
        _require(math.prod(self.global_shape) <= LARGEST_SIZE, f"{what}: absurdly large")
        _require(_is_size(self.position) and self.position % ALIGNMENT == 0, f"{what}: bad position")
        _require(len(self.checksums) == -(-self.bytes // BLOCK), f"{what}: wrong number of checksums")
        _require(all(c < 1 << 32 for c in self.checksums), f"{what}: a checksum of more than 32 bits")

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)

    @property
    def bytes(self) -> int:
        return stored_bytes(self.dtype, self.offset, self.shape)


@dataclass(frozen=True)
class Manifest:
    """All there is to know about a checkpoint or update. Raises ValueError when it contradicts itself."""

    kind: str
    pieces: tuple[Piece, ...]
    files: Mapping[str, int]  # bytes by name
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        _require(self.kind in KINDS, f"kind must be one of {', '.join(KINDS)}")
        for name, size in self.files.items():
            _require(_FILE_NAME.fullmatch(name) is not None, f"{name[:200]!r} is not a plain file name")
            _require(_is_size(size), f"file {name}: its size is not a number of bytes")
        if self.kind == "checkpoint":
            _require(_is_size(self.facts.get("step")), "a checkpoint's facts must tell its step")
        _check_packing(self.pieces, self.files)
        _check_agreement(self.pieces)

    @property
    def bytes(self) -> int:
        """Of all files, the manifest itself not counted."""
        return sum(self.files.values())

    @property
    def sha256(self) -> str:
        """Of manifest.json as it lies on disk."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        body = {
            "kind": self.kind,
            "pieces": [vars(piece) for piece in self.pieces],
            "files": dict(self.files),
            "facts": dict(self.facts),
        }
        return _canonical({**body, "crc32c": crc32c(_canonical(body).encode())}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError with one line that says what is wrong."""
        try:
            manifest = cls._from_json(text)
            _require(manifest.to_json() == text, "the manifest does not match its own checksum")
        except RecursionError:
            raise ValueError("the manifest is nested too deeply") from None
        return manifest

    @classmethod
    def _from_json(cls, text: str) -> Manifest:
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the manifest is not JSON: {error}") from None
        _require_keys(raw, {"kind", "pieces", "files", "facts", "crc32c"}, "the manifest")
        _require_types(raw, {"kind": str, "pieces": list, "files": dict, "facts": dict}, "the manifest")
        return cls(raw["kind"], tuple(map(_piece, raw["pieces"])), raw["files"], raw["facts"])


def load(directory: Path) -> Manifest:
    """The manifest of a committed directory. Raises Damaged, or FileNotFoundError when not committed."""
    path = directory / MANIFEST
    try:
        size = path.stat().st_size
        _require(size <= LARGEST_MANIFEST, f"a manifest of {size} bytes; at most {LARGEST_MANIFEST} are read")
        return Manifest.from_json(path.read_bytes().decode("ascii"))
    except ValueError as error:
        raise Damaged(directory, str(error)) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(directory, f"{MANIFEST} cannot be read: {error.strerror}") from error


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raises Damaged unless all files are there, of the right size."""
    for name, size in manifest.files.items():
        try:
            found = (directory / name).lstat()
        except FileNotFoundError:
            raise Damaged(directory, f"{name} is missing") from None
        except OSError as error:
            raise Damaged(directory, f"{name} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):  # a link could lead out of the directory
            raise Damaged(directory, f"{name} is not a regular file")
        if found.st_size != size:
            raise Damaged(directory, f"{name} has {found.st_size} bytes, not {size}")


def block_ranges(size: int) -> list[tuple[int, int]]:
    """Where the blocks of `size` bytes begin and end."""
    return [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def aligned(position: int) -> int:
    """The first position at or after `position` where a piece may begin."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def _piece(raw: Any) -> Piece:
    _require_keys(raw, {field.name for field in fields(Piece)}, "a piece")
    _require_types(raw, dict.fromkeys(("name", "dtype", "file"), str), "a piece")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Piece(**values)


def _check_packing(pieces: Iterable[Piece], files: Mapping[str, int]) -> None:
    """Pieces lie one after the other and fill their file, so that no byte of it goes unchecked."""
    ends = dict.fromkeys(files, 0)
    for piece in sorted(pieces, key=lambda piece: (piece.position, piece.bytes)):
        _require(piece.file in ends, f"tensor {piece.name[:200]!r}: its file is not listed")
        expected = aligned(ends[piece.file])
        _require(piece.position == expected, f"tensor {piece.name[:200]!r}: not at position {expected}")
        ends[piece.file] = piece.position + piece.bytes
    for name, end in ends.items():
        _require(files[name] == end, f"file {name}: {files[name]} bytes listed, its tensors fill {end}")


def _check_agreement(pieces: Iterable[Piece]) -> None:
    kinds: dict[str, set[tuple[Shape, str]]] = defaultdict(set)
    for piece in pieces:
        kinds[piece.name].add((piece.global_shape, piece.dtype))
    for name, found in kinds.items():
        _require(len(found) == 1, f"tensor {name[:200]!r}: its pieces differ in global shape or dtype")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _require_keys(raw: Any, keys: set[str], what: str) -> None:
    _require(
        isinstance(raw, dict) and set(raw) == keys, f"{what} must have exactly {', '.join(sorted(keys))}"
    )


def _require_types(raw: Mapping[str, Any], types: Mapping[str, type], what: str) -> None:
    for key, kind in types.items():
        _require(isinstance(raw[key], kind), f"{what}: {key} is not a {kind.__name__}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SIZE


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(map(_is_size, values))
