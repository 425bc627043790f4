"""The sending end of a transfer on a file system: a committed checkpoint, read chunk by chunk."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from checkpoints import attempts
from checkpoints import manifest as form
from checkpoints.manifest import MANIFEST, Damaged
from checkpoints.replication.chunks import LARGEST, cut, name_of
from checkpoints.replication.compression import Encoded, Wish, encode


class FlatSource:
    """A committed checkpoint, read chunk by chunk; bytes that are not what was written do not leave it.

    It is held: retention leaves it alone until it is closed.
    """

    def __init__(self, path: Path, name: str = "", largest: int = LARGEST) -> None:
        self.directory = locate(path, name)
        self.name = self.directory.name
        with ExitStack() as held:
            _hold(self.directory, held)
            manifest = form.load(self.directory)
            form.check_files(self.directory, manifest)
            self.text = manifest.to_json()
            self._chunks = cut(manifest, largest)
            self._held = held.pop_all()

    def digest(self, index: int) -> str:
        """The name of a chunk. Raises Damaged."""
        return name_of(self._verified(index))

    def read(self, index: int, wish: Wish) -> Encoded:
        """A chunk, compressed where that pays. Raises Damaged."""
        began = time.perf_counter()
        data = self._verified(index)
        sent = encode(data, name_of(data), self._chunks[index].width, wish)
        return replace(sent, seconds=time.perf_counter() - began)

    def close(self) -> None:
        """It may be pruned again."""
        self._held.close()

    def _verified(self, index: int) -> bytearray:
        chunk = self._chunks[index]
        try:
            data = read_range(self.directory / chunk.file, chunk.position, chunk.size)
        except OSError as error:
            raise Damaged(self.directory, f"{chunk.file} cannot be read: {error.strerror}") from error
        if flaw := chunk.flaw(data):
            raise Damaged(self.directory, flaw)
        return data


def locate(path: Path, name: str = "") -> Path:
    """A committed checkpoint: `path`, or the one in it of this name, or the newest. Raises ValueError."""
    if (path / MANIFEST).exists() and name in ("", path.name):
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    found = [path / name] if (path / name / MANIFEST).exists() else [] if name else attempts.candidates(path)
    if not found:
        raise ValueError(f"{path}: neither a committed checkpoint nor a directory that holds one")
    return found[0]


def _hold(directory: Path, held: ExitStack) -> None:
    try:
        held.enter_context(attempts.hold(directory))
    except FileNotFoundError:
        raise ValueError(f"{directory}: has just been pruned") from None
    except OSError:  # another user's, a full disk, read only: it can be copied all the same
        return


def read_range(path: Path, position: int, size: int) -> bytearray:
    """Bytes of a file; fewer where it ends. Raises OSError."""
    data, got = bytearray(size), 0
    with path.open("rb", buffering=0) as stream:
        stream.seek(position)
        while got < size and (count := stream.readinto(memoryview(data)[got:])):
            got += count
    return data if got == size else data[:got]
