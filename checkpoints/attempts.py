"""Checkpoints and updates on a file system: written once, committed last, verified when read.

    <directory>/<name>.<attempt>/    one attempt; never written into again after a failure
        writer-00000.bin             one flat file per writer: tensors at multiples of 4 KiB
        writer-00000.json            its receipt: a manifest of that one file
        manifest.json                renamed into place last: now, and only now, the attempt counts

Nothing is pickled, and no torch is needed: the controller lists, verifies and prunes as well.
A crash at any point leaves either a committed attempt or one without a manifest.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import manifest as form
from checkpoints.manifest import MANIFEST, Damaged, Manifest

STALE_SECONDS = 3600.0  # an uncommitted attempt untouched for so long has no writer any more

_ATTEMPT = re.compile(r".+\.(\d+)")


def begin(directory: Path, name: str) -> Path:
    """A fresh, durable, empty directory `<directory>/<name>.<attempt>`. One process calls it."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [int(m[1]) for p in directory.iterdir() if p.stem == name and (m := _ATTEMPT.fullmatch(p.name))]
    attempt = directory / f"{name}.{max(numbers, default=0) + 1:04d}"
    attempt.mkdir()
    _sync(directory)
    return attempt


def commit(attempt: Path, writers: int, kind: str, facts: Mapping[str, Any]) -> Manifest:
    """Make an attempt count, once all `writers` have returned from write_shards. One process calls it.

    Receipts and the sizes of the files are checked; their bytes are when they are read. Raises Damaged
    when a writer's part is not there, FileExistsError when the attempt is committed already.
    """
    names = {f"{writer_name(writer)}.json" for writer in range(writers)}
    found = {path.name for path in attempt.glob("writer-*.json")}
    if found != names:
        odd = ", ".join(sorted(found ^ names))
        raise Damaged(attempt, f"the receipts are not those of {writers} writers: {odd}")
    try:
        receipts = [Manifest.from_json((attempt / name).read_text()) for name in sorted(names)]
    except ValueError as error:
        raise Damaged(attempt, f"a receipt cannot be read: {error}") from None
    pieces = tuple(piece for receipt in receipts for piece in receipt.pieces)
    files = {name: size for receipt in receipts for name, size in receipt.files.items()}
    manifest = Manifest.from_json(Manifest(kind, pieces, files, facts).to_json())  # as readers will see it
    form.check_files(attempt, manifest)
    if (attempt / MANIFEST).exists():
        raise FileExistsError(f"{attempt} is committed already")
    write_durably(attempt / MANIFEST, manifest.to_json())
    return manifest


@dataclass
class Survey:
    """What lies in a directory of attempts."""

    intact: list[Path] = field(default_factory=list)  # newest first: by step, then attempt
    damaged: list[Damaged] = field(default_factory=list)
    uncommitted: list[Path] = field(default_factory=list)


def survey(directory: Path) -> Survey:
    """Sort the attempts in `directory`, by their manifests and the sizes of their files."""
    result = Survey()
    ages: dict[Path, tuple[int, int]] = {}
    for path in sorted(directory.glob("*")):
        if not (match := _ATTEMPT.fullmatch(path.name)) or not path.is_dir():
            continue
        try:
            manifest = form.load(path)
            form.check_files(path, manifest)
            ages[path] = (manifest.facts.get("step", 0), int(match[1]))
        except FileNotFoundError:
            result.uncommitted.append(path)
        except Damaged as damage:
            result.damaged.append(damage)
    result.intact = sorted(ages, key=lambda path: ages[path], reverse=True)
    return result


def candidates(directory: Path) -> list[Path]:
    """Committed attempts to restore from, newest first; what is damaged is left out (see `survey`)."""
    return survey(directory).intact


def superfluous(directory: Path, keep: int, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """What `prune` would delete: see there."""
    found = survey(directory)
    stale = [path for path in found.uncommitted if _idle_seconds(path) > stale_seconds]
    return found.intact[max(keep, 2) :] + stale


def prune(directory: Path, keep: int, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """Delete all but the newest `keep` (at least two) intact attempts; returns what was deleted.

    The manifest goes first, so that a crash in between leaves nothing that counts. Attempts that were
    never committed go when nothing in them has changed for `stale_seconds`. Damaged ones stay: an
    operator may still want them, and a file system that does not answer must not cost a checkpoint.
    """
    gone = superfluous(directory, keep, stale_seconds)
    for path in gone:
        (path / MANIFEST).unlink(missing_ok=True)
        _sync(path)
        shutil.rmtree(path)
    return gone


def is_attempt(path: Path) -> bool:
    """Whether a directory is one attempt (or update), and not a directory of attempts."""
    return (path / MANIFEST).exists() or _ATTEMPT.fullmatch(path.name) is not None


def writer_name(number: int) -> str:
    return f"writer-{number:05d}"


def _idle_seconds(path: Path) -> float:
    return time.time() - max(p.lstat().st_mtime for p in (path, *path.iterdir()))


def write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
