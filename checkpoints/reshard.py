"""Rewriting a committed checkpoint in other pieces: streaming, in bounded memory, every byte read once.

A tensor is assembled a slab of rows at a time from the source's verified blocks, and each slab's part of
every target piece goes to the piece's next bytes: pieces are boxes, so rows arrive in the order in which they
lie there. A block is read once and kept until its last row is used, as far as memory allows (`read_bytes`
tells); nothing of the size of a tensor is ever held. Bytes are moved, not values: no torch, and no rounding.

An attempt that was cut short is taken up again: `.reshard.jsonl` in it names source and target, and what is
done. Nothing counts before all of it has been read back and verified and the manifest renamed into place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from crc32c import crc32c

from checkpoints import manifest as form
from checkpoints.attempts import begin, commit, write_durably, writer_name
from checkpoints.blocks import damages
from checkpoints.formats import ITEM_BYTES
from checkpoints.manifest import BLOCK, MANIFEST, Manifest, Piece
from checkpoints.ranges import Box, intersect, subtract
from checkpoints.slabs import SLAB, Source, slabs

MEMORY = 768 << 20  # bytes of all workers' slabs and blocks; at least one block for each worker
JOURNAL = ".reshard.jsonl"

Wanted = Mapping[str, Sequence[tuple[int, Box]]]  # by tensor: the writer and the box of each target piece


@dataclass
class Target:
    """A piece to be written: what is known of it before, and its checksums as they come."""

    name: str
    box: Box
    writer: int
    position: int
    checksums: list[int] = field(default_factory=list)
    written: int = 0  # bytes

    def append(self, descriptor: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            room = BLOCK - self.written % BLOCK
            part, view = view[:room], view[room:]
            if self.written % BLOCK == 0:
                self.checksums.append(0)
            self.checksums[-1] = crc32c(part, self.checksums[-1])
            done = 0
            while done < len(part):
                done += os.pwrite(descriptor, part[done:], self.position + self.written + done)
            self.written += len(part)


@dataclass(frozen=True)
class Result:
    """`read_bytes` of the source, to be held against the bytes of its tensors."""

    path: Path
    manifest: Manifest
    read_bytes: int


def reshard(
    source: Path,
    directory: Path,
    wanted: Wanted,
    writers: int,
    facts: Mapping[str, Any],
    workers: int = 2,
    memory: int = MEMORY,
    was_written: Callable[[int], object] = lambda _: None,
) -> Result:
    """Write the checkpoint `source` as an attempt in `directory`, in the pieces `wanted`, and commit it.

    Tensors that `wanted` does not name keep their pieces. Raises Damaged when the source is, ValueError when
    `wanted` does not cover a tensor or another process is at the same work, OSError when there is no room.
    """
    old = form.load(source)
    form.check_files(source, old)
    targets = _targets(old, wanted, writers)
    identity = _identity(old, targets, facts)
    attempt = _attempt(source, directory, identity)
    with (attempt / JOURNAL).open("a+") as journal:
        done = _take_up(journal, attempt, identity)
        work = _Work(source, attempt, old, journal, memory // workers, was_written)
        work.run(targets, done, writers, workers)
    _verify(attempt, targets, old, writers)
    (attempt / JOURNAL).unlink()
    return Result(attempt, commit(attempt, writers, old.kind, facts), work.read_bytes)


def _targets(old: Manifest, wanted: Wanted, writers: int) -> dict[str, list[Target]]:
    """By tensor. Files are filled in the order of tensors' names."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in old.pieces:
        pieces[piece.name].append(piece)
    ends = [0] * writers
    targets: dict[str, list[Target]] = {}
    for name in sorted(pieces):
        item = ITEM_BYTES[pieces[name][0].dtype]
        whole = Box((0,) * len(pieces[name][0].global_shape), pieces[name][0].global_shape)
        boxes = wanted.get(name, [(number % writers, piece.box) for number, piece in enumerate(pieces[name])])
        _check_covers(name, whole, [box for _, box in boxes])
        targets[name] = []
        for writer, box in boxes:
            position = form.aligned(ends[writer])
            ends[writer] = position + box.size * item
            targets[name].append(Target(name, box, writer, position))
    return targets


def _check_covers(name: str, whole: Box, boxes: list[Box]) -> None:
    inside = all(len(box.shape) == len(whole.shape) and subtract(box, whole) == [] for box in boxes)
    if not inside or sum(box.size for box in boxes) < whole.size:
        raise ValueError(
            f"tensor {name!r} of shape {whole.shape}: the target layout's pieces do not cover it"
        )


def _identity(old: Manifest, targets: dict[str, list[Target]], facts: Mapping[str, Any]) -> str:
    boxes = [[t.name, t.box.offset, t.box.shape, t.writer] for ts in targets.values() for t in ts]
    return hashlib.sha256(json.dumps([old.sha256, boxes, dict(facts)], sort_keys=True).encode()).hexdigest()


def _attempt(source: Path, directory: Path, identity: str) -> Path:
    """The attempt of the same work that was cut short, or a new one."""
    name = source.name.rpartition(".")[0] or source.name
    for journal in sorted(directory.glob(f"{name}.*/{JOURNAL}")):
        with journal.open() as stream:
            if stream.readline() == f"{json.dumps(identity)}\n" and not (journal.parent / MANIFEST).exists():
                return journal.parent
    return begin(directory, name)


def _take_up(journal: TextIO, attempt: Path, identity: str) -> dict[str, list[list[int]]]:
    """What the journal says is done: the checksums of every target piece, by tensor."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the journal is closed
    except BlockingIOError:
        raise ValueError(f"{attempt}: another process is writing it") from None
    journal.seek(0)
    text = journal.read()
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be torn
    if not lines:
        journal.truncate(0)
        journal.write(json.dumps(identity) + "\n")
    elif len(text) != text.rfind("\n") + 1:
        journal.truncate(len(text[: text.rfind("\n") + 1].encode()))
    journal.flush()
    return dict(json.loads(line) for line in lines[1:])


@dataclass
class _Work:
    """One rewriting; threads share it (reading, copying, checksums and writing release the interpreter)."""

    source: Path
    attempt: Path
    old: Manifest
    journal: TextIO
    memory: int  # of one worker
    was_written: Callable[[int], object]
    read_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    descriptors: list[int] = field(default_factory=list)

    def run(
        self, targets: dict[str, list[Target]], done: dict[str, list[list[int]]], writers: int, workers: int
    ) -> None:
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.old.pieces:
            pieces[piece.name].append(piece)
        try:
            for writer in range(writers):
                path = self.attempt / f"{writer_name(writer)}.bin"
                self.descriptors.append(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
            largest_first = sorted(targets, key=lambda name: -sum(piece.bytes for piece in pieces[name]))
            with ThreadPoolExecutor(workers) as pool:
                jobs = [pool.submit(self._tensor, pieces[n], targets[n], done.get(n)) for n in largest_first]
                try:
                    for job in jobs:
                        job.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            for descriptor in self.descriptors:
                os.fsync(descriptor)
        finally:
            for descriptor in self.descriptors:
                os.close(descriptor)

    def _tensor(self, pieces: list[Piece], targets: list[Target], done: list[list[int]] | None) -> None:
        item = ITEM_BYTES[pieces[0].dtype]
        if done is not None:
            for target, checksums in zip(targets, done, strict=True):
                target.checksums, target.written = checksums, target.box.size * item
                self.was_written(target.written)
            return
        source = Source(self.source, pieces, item, max(1, (self.memory - 2 * SLAB) // BLOCK))
        for slab in slabs(pieces[0].global_shape, item):
            values = source.read(slab)
            for target in targets:
                common = intersect(target.box, slab)
                if common is not None:
                    part = np.ascontiguousarray(values[common.slices(slab)])
                    target.append(self.descriptors[target.writer], part.reshape(-1).view(np.uint8).data)
                    self.was_written(part.nbytes)
        with self.lock:
            self.read_bytes += source.read_bytes
            self.journal.write(json.dumps([targets[0].name, [t.checksums for t in targets]]) + "\n")
            self.journal.flush()


def _verify(attempt: Path, targets: dict[str, list[Target]], old: Manifest, writers: int) -> None:
    """Read everything back, then leave the receipts. Raises Damaged, and nothing is taken up again then."""
    told = {piece.name: (piece.global_shape, piece.dtype) for piece in old.pieces}
    by_writer: dict[int, list[Piece]] = defaultdict(list)
    for target in (target for ts in targets.values() for target in ts):
        shape, dtype = told[target.name]
        file, checksums = f"{writer_name(target.writer)}.bin", tuple(target.checksums)
        piece = Piece(
            target.name, shape, target.box.offset, target.box.shape, dtype, file, target.position, checksums
        )
        by_writer[target.writer].append(piece)
    for writer in range(writers):
        file = f"{writer_name(writer)}.bin"
        receipt = Manifest("receipt", tuple(by_writer[writer]), {file: (attempt / file).stat().st_size}, {})
        for damage in damages(attempt, receipt):
            (attempt / JOURNAL).unlink()
            raise damage
        write_durably(attempt / f"{writer_name(writer)}.json", receipt.to_json())
