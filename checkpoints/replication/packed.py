"""Both ends of a transfer in a store of packs (packs.py): any URL that fsspec can open.

It keeps checkpoints, compressed as they came, and gives them back; nothing trains from there. What a killed
sender left costs nothing again as far as the store kept it: a file system every record but the last one, an
object store every finished pack.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from checkpoints.manifest import MANIFEST, Damaged, Manifest
from checkpoints.replication.chunks import LARGEST, Chunk, cut, name_of
from checkpoints.replication.compression import Encoded, Garbled, Wish, decode
from checkpoints.replication.ends import Begun
from checkpoints.replication.packs import Pack, Record, Store, key_of
from checkpoints.replication.throttle import SLICE, Throttle, unlimited

INDEX = "chunks.json"
_DIGITS = 16


class PackTarget:
    """One stream into a store; all streams of a copy share the store."""

    def __init__(self, store: Store, throttle: Throttle = unlimited, largest: int = LARGEST) -> None:
        self._store, self._throttle, self._largest = store, throttle, largest
        self._name, self._text = "", ""
        self._chunks: tuple[Chunk, ...] = ()
        self._pack: Pack | None = None

    def begin(self, name: str, text: str, anew: bool = False) -> Begun:
        """Raises ValueError for what is no checkpoint."""
        self._name, self._text = name, text
        self._store.survey()
        self._chunks = cut(Manifest.from_json(text), self._largest)
        promising = frozenset(i for i, chunk in enumerate(self._chunks) if self._store.find(key_of(chunk)))
        finished = not anew and _is_whole(self._store, self._folder, self._text)
        return Begun(promising, self._where if finished else "")

    def digest(self, index: int) -> str | None:
        """The name of a chunk in the store, which is read back."""
        chunk = self._chunks[index]
        for record in reversed(self._store.find(key_of(chunk))):
            if _sound(self._store, record, chunk) is not None:
                self._store.chosen[index] = record
                return record.name
            self._store.forget(record)
        return None

    def adopt(self, index: int) -> str | None:
        """Chunks are shared where they lie: nothing is taken over."""
        assert index < len(self._chunks)
        return None

    def write(self, index: int, sent: Encoded) -> None:
        """Append a chunk to this stream's pack; it is durable when the pack is finished."""
        for start in range(0, len(sent.payload), SLICE):
            self._throttle(min(SLICE, len(sent.payload) - start))
        key = key_of(self._chunks[index])
        while self._pack is None or not self._pack.add(key, sent):
            self._pack = self._store.pack()

    def commit(self) -> str:
        """Where the chunks lie, then the manifest."""
        self._store.settle()
        records = [vars(self._store.chosen[index]) for index in range(len(self._chunks))]
        listed = {"name": self._name, "largest": self._largest, "chunks": records}
        self._store.write(f"{self._folder}/{INDEX}", json.dumps(listed).encode())
        self._store.write(f"{self._folder}/{MANIFEST}", self._text.encode())
        return self._where

    def close(self) -> None:
        """What was written stays."""
        self._store.settle()

    @property
    def _folder(self) -> str:
        """Named after the contents: two checkpoints never meet, two copies of one write the same."""
        return f"{self._name}-{hashlib.sha256(self._text.encode()).hexdigest()[:_DIGITS]}"

    @property
    def _where(self) -> str:
        return str(self._store.files.unstrip_protocol(f"{self._store.root}/{self._folder}"))


class PackSource:
    """A checkpoint in a store: `url` is its folder, or the store's root, of which the newest is taken."""

    def __init__(self, url: str, name: str = "", throttle: Throttle = unlimited) -> None:
        self._throttle = throttle
        self._store, folder = self._locate(url, name)
        self._where = Path(f"{self._store.root}/{folder}")
        self.text = self._store.read(f"{folder}/{MANIFEST}").decode()
        self.name = str(self._index(folder)["name"])

    def digest(self, index: int) -> str:
        """The name that was stored: a target that has such a chunk, verified, needs nothing read."""
        return self._records[index].name

    def read(self, index: int, _: Wish) -> Encoded:
        """A chunk, compressed if it was stored so. Raises Damaged."""
        record, chunk = self._records[index], self._chunks[index]
        self._throttle(record.size)
        if (found := _sound(self._store, record, chunk)) is None:
            where = f"{record.pack}: bytes {record.position} to {record.position + record.size}"
            raise Damaged(self._where, f"{where} are not the chunk of {chunk.file} at {chunk.position}")
        return found

    def close(self) -> None:
        """Nothing is held: packs are not pruned."""

    def _locate(self, url: str, name: str) -> tuple[Store, str]:
        store = Store(url)
        if store.has(MANIFEST):
            root, _, folder = url.rstrip("/").rpartition("/")
            return Store(root), folder
        found = []
        for folder in store.folders():
            if folder[: -_DIGITS - 1] == name or not name:
                with contextlib.suppress(FileNotFoundError, ValueError):
                    manifest = Manifest.from_json(store.read(f"{folder}/{MANIFEST}").decode())
                    found.append((manifest.facts.get("step", 0), folder))
        if not found:
            raise ValueError(f"{url}: holds no checkpoint" + (f" called {name}" if name else ""))
        return store, max(found)[1]

    def _index(self, folder: str) -> dict[str, Any]:
        try:
            listed = json.loads(self._store.read(f"{folder}/{INDEX}"))
            self._records = [Record(**row) for row in listed["chunks"]]
            self._chunks = cut(Manifest.from_json(self.text), listed["largest"])
            whole = len(self._records) == len(self._chunks)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise Damaged(self._where, f"{INDEX} does not list its chunks")
        return dict(listed)


def _sound(store: Store, record: Record, chunk: Chunk) -> Encoded | None:
    """A stored chunk, read and verified; None where it is not what it should be."""
    try:
        found = store.load(record)
        data = decode(found, chunk.size)
    except (FileNotFoundError, Garbled):
        return None
    return found if name_of(data) == record.name and chunk.flaw(data) is None else None


def _is_whole(store: Store, folder: str, text: str) -> bool:
    try:
        return store.read(f"{folder}/{MANIFEST}") == text.encode()
    except FileNotFoundError:
        return False
