"""The receiving end of a transfer on a file system.

    <directory>/.<name>.<manifest>.incoming/   what has come so far: the flat files, with holes
    <directory>/<name>.<attempt>/              renamed from it once every chunk has been read back

Chunks are put where they belong in the flat files; packing them would hold few large files a second time.
What is there after a kill is found by reading it: no list of chunks is kept that
could say more than the disk. An incoming directory is named after the manifest it is for, so that two senders
of the same checkpoint write the same bytes to the same places, and those of different ones never meet.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoints import manifest as form
from checkpoints.attempts import synchronise
from checkpoints.manifest import MANIFEST, Damaged, Manifest
from checkpoints.replication.chunks import LARGEST, Chunk, Fingerprint, cut, name_of
from checkpoints.replication.compression import Data, Encoded, Garbled, decode
from checkpoints.replication.ends import Begun
from checkpoints.replication.flat import read_range
from checkpoints.replication.throttle import SLICE, Throttle, unlimited

Places = dict[Fingerprint, list[tuple[Path, Chunk]]]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
_NUMBERED = re.compile(r"(.+)\.(\d+)")
_INCOMING = ".incoming"


class FlatTarget:
    """A directory that receives a checkpoint. Several may work on one at the same time, in any process."""

    def __init__(self, directory: Path, throttle: Throttle = unlimited, largest: int = LARGEST) -> None:
        self.directory = directory
        self._throttle, self._largest = throttle, largest
        self._name, self._text = "", ""
        self._chunks: tuple[Chunk, ...] = ()
        self._ignored: set[Path] = set()
        self._places: Places = {}
        self._descriptors: dict[str, int] = {}

    def begin(self, name: str, text: str, anew: bool = False) -> Begun:
        """Make room for a checkpoint. Raises ValueError, or OSError where it would not fit.

        `anew`: receive it although it is there already, because what is there is damaged.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:100]!r} is not a checkpoint's name")
        manifest = Manifest.from_json(text)
        self._name, self._text, self._chunks = name, text, cut(manifest, self._largest)
        twins = [path for path, other in _committed_in(self.directory) if other.to_json() == text]
        self._ignored = set(twins if anew else [])
        if twins and not anew:
            self._incoming = twins[0]
            return Begun(frozenset(range(len(self._chunks))), str(twins[0]))
        self._incoming = self.directory / f".{name}.{manifest.sha256[:16]}{_INCOMING}"
        self._make_room(manifest)
        self._places = places(self._chunks, self._incoming, self.directory, self._largest)
        here = {index for index, chunk in enumerate(self._chunks) if self._has_data(chunk)}
        self._check_space(manifest.bytes - sum(self._chunks[index].size for index in here))
        known = {index for index, chunk in enumerate(self._chunks) if chunk.fingerprint in self._places}
        return Begun(frozenset(here | known))

    def digest(self, index: int) -> str | None:
        """The name of what lies at a chunk's place, read from the disk; None where that is not the chunk."""
        chunk = self._chunks[index]
        path = self._whereabouts() / chunk.file
        try:
            data = read_range(path, chunk.position, chunk.size)
        except FileNotFoundError:
            return None
        return None if chunk.flaw(data) else name_of(data)

    def adopt(self, index: int) -> str | None:
        """Take a chunk from another place at this site; its name, or None where there is no such chunk."""
        chunk = self._chunks[index]
        for path, twin in self._places.get(chunk.fingerprint, []):
            with contextlib.suppress(OSError):  # pruned meanwhile
                data = read_range(path / twin.file, twin.position, twin.blocks_end)
                data.extend(bytes(chunk.size - len(data)))  # the padding differs at a file's end
                if chunk.flaw(data) is None:
                    self._put(chunk, data)
                    return name_of(data)
        return None

    def write(self, index: int, sent: Encoded) -> None:
        """Store a chunk durably. Raises Garbled when it is not what its name says, OSError (a full disk)."""
        for start in range(0, len(sent.payload), SLICE):
            self._throttle(min(SLICE, len(sent.payload) - start))
        chunk = self._chunks[index]
        data = decode(sent, chunk.size)
        if name_of(data) != sent.name:
            raise Garbled(f"{chunk.file}: what came for byte {chunk.position} has another name")
        self._put(chunk, data)

    def commit(self) -> str:
        """Give the checkpoint its name, once every chunk's digest was right; where it lies now."""
        while self._whereabouts().name.endswith(_INCOMING):
            with contextlib.suppress(FileNotFoundError):  # another sender of the same checkpoint was faster
                for file in Manifest.from_json(self._text).files:
                    synchronise(self._incoming / file)
                self._write_manifest()
                self._incoming = self._rename()
        return str(self._incoming)

    def close(self) -> None:
        """Without effect on what was received."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _make_room(self, manifest: Manifest) -> None:
        self._incoming.mkdir(parents=True, exist_ok=True)
        for file, size in manifest.files.items():
            with (self._incoming / file).open("ab") as stream:
                stream.truncate(size)

    def _has_data(self, chunk: Chunk) -> bool:
        """Whether something was ever written there; file systems that cannot tell say yes."""
        try:
            position = os.lseek(self._descriptor(chunk.file), chunk.position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return position < chunk.position + chunk.size

    def _check_space(self, needed: int) -> None:
        """Quotas are not seen here; they end a write, and the transfer goes on once there is room."""
        facts = os.statvfs(self.directory)
        if (free := facts.f_bavail * facts.f_frsize) < needed:
            told = f"{needed / 1e9:.3g} GB are missing, {free / 1e9:.3g} GB are free"
            raise OSError(errno.ENOSPC, told, str(self.directory))

    def _put(self, chunk: Chunk, data: Data) -> None:
        try:
            descriptor = self._descriptor(chunk.file)
        except FileNotFoundError:  # another sender has committed it: what is there is verified at the end
            self._whereabouts()
            return
        view, position = memoryview(data), chunk.position
        while view:
            count = os.pwrite(descriptor, view, position)
            view, position = view[count:], position + count
        os.fdatasync(descriptor)
        # so that reading back asks the disk; on Linux only clean pages go, hence after the sync
        os.posix_fadvise(descriptor, chunk.position, chunk.size, os.POSIX_FADV_DONTNEED)

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._incoming / file, os.O_RDWR)
        return self._descriptors[file]

    def _whereabouts(self) -> Path:
        """The incoming directory, or the checkpoint that another sender has made of it meanwhile."""
        if not self._incoming.is_dir():
            twins = (path for path, other in _committed_in(self.directory) if other.to_json() == self._text)
            found = next((path for path in twins if path not in self._ignored), None)
            if found is None:
                raise FileNotFoundError(
                    errno.ENOENT, "removed while a checkpoint came in", str(self._incoming)
                )
            self._incoming = found
        return self._incoming

    def _write_manifest(self) -> None:
        """Under a name of its own first: another sender may do the same at this moment."""
        temporary = self._incoming / f".manifest.{uuid.uuid4().hex}"
        with temporary.open("x") as stream:
            stream.write(self._text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(self._incoming / MANIFEST)
        for left in self._incoming.glob(".manifest.*"):  # by a killed one
            left.unlink(missing_ok=True)
        synchronise(self._incoming)

    def _rename(self) -> Path:
        match = _NUMBERED.fullmatch(self._name)
        stem, first = (match[1], int(match[2])) if match else (self._name, 1)
        for number in itertools.count(first):
            final = self.directory / f"{stem}.{number:04d}"
            try:
                final.mkdir()  # exclusively: a rename alone would replace somebody else's empty directory
            except FileExistsError:
                continue
            try:
                self._incoming.rename(final)
            except FileNotFoundError:
                final.rmdir()
                raise
            synchronise(self.directory)
            break
        return final


def places(chunks: Iterable[Chunk], incoming: Path, directory: Path, largest: int) -> Places:
    """Where bytes lie that are most likely those of a chunk: in checkpoints beside it, or twice in itself."""
    found: Places = defaultdict(list)
    for chunk in chunks:
        found[chunk.fingerprint].append((incoming, chunk))
    known = {key: here for key, here in found.items() if len(here) > 1}
    for path, other in _committed_in(directory):
        for chunk in cut(other, largest):
            if chunk.fingerprint in found:
                known.setdefault(chunk.fingerprint, []).append((path, chunk))
    return known


def _committed_in(directory: Path) -> Iterator[tuple[Path, Manifest]]:
    for path in sorted(directory.glob("*.*")) if directory.is_dir() else ():
        if _NUMBERED.fullmatch(path.name) and (path / MANIFEST).exists():
            with contextlib.suppress(Damaged, FileNotFoundError):
                manifest = form.load(path)
                form.check_files(path, manifest)
                yield path, manifest
