"""Chunks in large objects, for stores where an object is written once and objects are counted (fsspec).

    <root>/packs/<random>.pack                   records: a head and an encoded chunk, until 1 GiB is reached
    <root>/packs/<random>.index                  the heads of a pack that was finished, as JSON
    <root>/<name>-<16 digits>/chunks.json        in which records a checkpoint's chunks lie
    <root>/<name>-<16 digits>/manifest.json      last: now the checkpoint counts (the digits are its sha256's)

An index is a convenience: where it is missing or torn, the heads in the pack are read, as far as they
go. No record is taken for a chunk before it has been read and has its name and its checksums.
LUMI-O allows 500,000 objects per project; a 70B checkpoint with Adam's state in chunks would be 30,000.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from blake3 import blake3
from crc32c import crc32c

from checkpoints.replication.chunks import LARGEST, Chunk
from checkpoints.replication.compression import RAW, WIDTHS, Encoded

PACK = 1 << 30  # bytes after which a new object is begun
_CODECS = (RAW, *WIDTHS)
_HEAD = struct.Struct("<8s32s32sBI")  # magic, key, name, codec, bytes of the chunk as it is stored
_CHECK = struct.Struct("<I")  # crc32c of the head
HEAD_BYTES = _HEAD.size + _CHECK.size
_MAGIC = b"etchunk1"
_LARGEST_STORED = 2 * LARGEST


@dataclass(frozen=True)
class Record:
    """Where a chunk lies. `key` names what a manifest tells of the chunk, `name` the chunk itself."""

    key: str
    name: str
    codec: str
    pack: str  # the object's own name
    position: int  # of the stored bytes
    size: int  # of them


def key_of(chunk: Chunk) -> str:
    """64 hexadecimal digits: known before the chunk is read, and the same wherever the chunk lies."""
    return blake3(repr((chunk.size, chunk.fingerprint)).encode()).hexdigest()


class Store:
    """The packs below one URL, as all streams of one copy see them."""

    def __init__(self, url: str, pack_bytes: int = PACK) -> None:
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:  # no such protocol, or its package is not installed
            raise ValueError(f"{url}: {error}") from None
        self.root = self.root.rstrip("/")
        self.pack_bytes = pack_bytes
        self._records: dict[str, list[Record]] = defaultdict(list)
        self.chosen: dict[int, Record] = {}  # of the checkpoint that is being written: read back and right
        self._open: dict[str, Pack] = {}
        self._lock = threading.RLock()
        self._is_surveyed = False

    def survey(self) -> None:
        """Find the records of all packs, once."""
        with self._lock:
            if self._is_surveyed:
                return
            self._is_surveyed = True
        for path, size in self._listed(f"{self.root}/packs"):
            name = path.rsplit("/", 1)[-1]
            if name.endswith(".pack"):
                for record in self._indexed(name, size) or self._scanned(name, size):
                    self.note(record)

    def note(self, record: Record) -> None:
        with self._lock:
            self._records[record.key].append(record)

    def find(self, key: str) -> list[Record]:
        """Where a chunk may lie, the newest last."""
        with self._lock:
            return list(self._records.get(key, ()))

    def forget(self, record: Record) -> None:
        """It is not what its head says."""
        with self._lock:
            self._records[record.key].remove(record)

    def load(self, record: Record) -> Encoded:
        """A stored chunk; whether it is right shows when it is decoded. Raises OSError."""
        if record.pack in self._open:
            self.settle()
        path = f"{self.root}/packs/{record.pack}"
        data = self.files.cat_file(path, start=record.position, end=record.position + record.size)
        return Encoded(record.name, record.codec, data)

    def pack(self) -> Pack:
        """A new object to write records into."""
        pack = Pack(self, f"{uuid.uuid4().hex}.pack")
        with self._lock:
            self._open[pack.name] = pack
        return pack

    def settle(self) -> None:
        """Finish all packs that are being written: only then can they be read everywhere."""
        with self._lock:
            for pack in self._open.values():
                pack.finish()
            self._open.clear()

    def write(self, path: str, content: bytes) -> None:
        """An object, whole or not at all as far as the store can."""
        whole = f"{self.root}/{path}"
        self.files.makedirs(whole.rpartition("/")[0], exist_ok=True)
        part = f"{whole}.{uuid.uuid4().hex}.part"
        stream = self.files.open(part, "wb")
        stream.write(content)
        _close(stream)
        self.files.mv(part, whole)

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        return bytes(self.files.cat_file(f"{self.root}/{path}"))

    def has(self, path: str) -> bool:
        return bool(self.files.exists(f"{self.root}/{path}"))

    def folders(self) -> list[str]:
        """Names of what may be checkpoints."""
        found = self.files.ls(self.root, detail=True, refresh=True) if self.files.exists(self.root) else []
        names = [
            entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "directory"
        ]
        return sorted(set(names) - {"packs"})

    def _listed(self, folder: str) -> Iterator[tuple[str, int]]:
        if self.files.exists(folder):
            for entry in self.files.ls(folder, detail=True, refresh=True):
                yield entry["name"], entry["size"]

    def _indexed(self, pack: str, size: int) -> list[Record]:
        """What a pack's index says; nothing where it is not whole or not of this pack."""
        try:
            rows = json.loads(self.read(f"packs/{pack.removesuffix('.pack')}.index"))
            records = [Record(pack=pack, **row) for row in rows]
            whole = sum(record.size + HEAD_BYTES for record in records) == size
        except (OSError, ValueError, TypeError):
            return []
        return records if whole else []

    def _scanned(self, pack: str, size: int) -> list[Record]:
        """The records from a pack's beginning on; the last may be cut off, as its bytes will show."""
        found, position = [], 0
        while position + HEAD_BYTES <= size:
            head = self.files.cat_file(f"{self.root}/packs/{pack}", start=position, end=position + HEAD_BYTES)
            record = _parsed(head, pack, position + HEAD_BYTES)
            if record is None:
                break
            found.append(record)
            position = record.position + record.size
        return found


class Pack:
    """One object that is being written, by one stream."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.is_finished = False
        self._store = store
        self._records: list[Record] = []
        self._size = 0
        self._lock = threading.Lock()
        folder = f"{store.root}/packs"
        store.files.makedirs(folder, exist_ok=True)
        self._stream: IO[bytes] = store.files.open(f"{folder}/{name}", "wb")

    def add(self, key: str, sent: Encoded) -> bool:
        """Append a record; False where another stream wanted to read what is here, and it is finished."""
        with self._lock:
            if self.is_finished:
                return False
            record = Record(key, sent.name, sent.codec, self.name, self._size + HEAD_BYTES, len(sent.payload))
            self._stream.write(_head(record))
            self._stream.write(sent.payload)
            self._stream.flush()  # a file system has it now, an object store when a part is full
            self._size = record.position + record.size
            self._records.append(record)
        self._store.note(record)
        if self._size >= self._store.pack_bytes:
            self.finish()
        return True

    def finish(self) -> None:
        """Close the object and write its index. Without effect the second time."""
        with self._lock:
            if self.is_finished:
                return
            self.is_finished = True
            _close(self._stream)
        rows: list[dict[str, Any]] = [
            {k: v for k, v in vars(r).items() if k != "pack"} for r in self._records
        ]
        self._store.write(f"packs/{self.name.removesuffix('.pack')}.index", json.dumps(rows).encode())


def _close(stream: IO[bytes]) -> None:
    """Durably where it is a file; an object is when it appears."""
    stream.flush()
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        os.fsync(stream.fileno())
    stream.close()


def _head(record: Record) -> bytes:
    head = _HEAD.pack(
        _MAGIC,
        bytes.fromhex(record.key),
        bytes.fromhex(record.name),
        _CODECS.index(record.codec),
        record.size,
    )
    return head + _CHECK.pack(crc32c(head))


def _parsed(data: bytes, pack: str, position: int) -> Record | None:
    if len(data) != HEAD_BYTES or _CHECK.pack(crc32c(data[: _HEAD.size])) != data[_HEAD.size :]:
        return None
    magic, key, name, codec, size = _HEAD.unpack(data[: _HEAD.size])
    if magic != _MAGIC or codec >= len(_CODECS) or size > _LARGEST_STORED:
        return None
    return Record(key.hex(), name.hex(), _CODECS[codec], pack, position, size)
