"""Files that are brought to a site: named by contents, hashed in pieces, remembered once verified.

A piece that has arrived is verified by itself, so that a transfer cut off after 900 GB is gone on with, a
flipped bit costs one piece to send again, and a terabyte is verified in many short calls.

Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping  # noqa: UP035 - Python 3.9 at the sites

from clusters.paths import write_atomically

PIECE = 64 << 20  # bytes: a tenth of a second of hashing, and 1 MB of digests for a terabyte
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StagedFile:
    """A file as it shall be at a site: `path` under scratch, `pieces` the SHA-256 of each `piece` bytes."""

    path: str
    size: int
    sha256: str
    pieces: tuple[str, ...]
    piece: int = PIECE

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "pieces": list(self.pieces)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> StagedFile:
        """Raises TypeError or KeyError when this is none."""
        return cls(**{**raw, "pieces": tuple(raw["pieces"])})

    @property
    def part(self) -> str:
        """Where under scratch it grows while it arrives: whatever its name, it is gone on with."""
        return f"incoming/{self.sha256}.part"

    def range(self, number: int) -> tuple[int, int]:
        """First byte of a piece, and its length."""
        first = number * self.piece
        return first, min(self.piece, self.size - first)


def measure(source: Path, path: str, piece: int = PIECE) -> StagedFile:
    """Read a file once. Raises OSError."""
    whole, pieces, size = hashlib.sha256(), [], 0
    with source.open("rb") as stream:
        while True:
            digest, length = hashlib.sha256(), 0
            for block in _blocks(stream, piece):
                digest.update(block)
                whole.update(block)
                length += len(block)
            if not length:
                break
            pieces.append(digest.hexdigest())
            size += length
    return StagedFile(path, size, whole.hexdigest(), tuple(pieces), piece)


def is_good(file: Path, wanted: StagedFile, number: int) -> bool:
    """Whether a piece of a file is what it shall be. Raises OSError."""
    first, length = wanted.range(number)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(first)
        for block in _blocks(stream, length):
            digest.update(block)
    return digest.hexdigest() == wanted.pieces[number]


def _blocks(stream: Any, length: int) -> Iterator[bytes]:
    while length > 0:
        block = stream.read(min(_BLOCK, length))
        if not block:
            return
        length -= len(block)
        yield block


@dataclass
class Known:
    """What has been verified, until the file changes: size, time of change and inode tell.

    A file that cannot be read begins anew: everything is then verified once more.
    """

    path: Path

    def __post_init__(self) -> None:
        try:
            told = json.loads(self.path.read_text())
            self._entries: dict[str, Any] = told if isinstance(told, dict) else {}
        except (OSError, ValueError):
            self._entries = {}
        self._before = json.dumps(self._entries)

    def facts(self, file: Path) -> dict[str, Any]:
        """What was remembered of this very file; nothing of one that has changed. Raises OSError."""
        entry = self._entries.get(str(file), {})
        known = isinstance(entry, dict) and entry.get("identity") == identity(file)
        return dict(entry.get("facts", {})) if known else {}

    def remember(self, file: Path, **facts: Any) -> None:
        """Raises OSError."""
        self._entries[str(file)] = {"identity": identity(file), "facts": facts}

    def forget(self, file: Path) -> None:
        self._entries.pop(str(file), None)

    def save(self) -> None:
        """Raises OSError."""
        text = json.dumps(self._entries)
        if text != self._before:
            write_atomically(self.path, text)
            self._before = text


def identity(file: Path) -> list[int]:
    """What changes when a file does. Raises OSError."""
    facts = file.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]
