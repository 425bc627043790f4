"""Checkpoints and updates on a file system: written once, committed last, verified when read.

    <directory>/<name>.<attempt>/    one attempt; never written into again after a failure
        writer-00000.bin             one flat file per writer: tensors at multiples of 4 KiB
        writer-00000.json            its receipt: a manifest of that one file, until the attempt is committed
        manifest.json                renamed into place last: now, and only now, the attempt counts

Nothing is pickled, and no torch is needed: the controller lists, verifies and prunes as well.
A crash at any point leaves either a committed attempt or one without a manifest. FORMAT.md is for those
who want to read one with a program of their own.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import manifest as form
from checkpoints.manifest import MANIFEST, Damaged, Manifest

STALE_SECONDS = 3600.0  # an uncommitted attempt untouched for so long has no writer any more
HOLD_SECONDS = 600.0  # a hold that was not refreshed for so long has no holder any more

_HOLD = ".hold-"
_ATTEMPT = re.compile(r".+\.(\d+)")


def begin(directory: Path, name: str) -> Path:
    """A fresh, durable, empty directory `<directory>/<name>.<attempt>`. One process calls it."""
    directory.mkdir(parents=True, exist_ok=True)
    attempt = attempt_path(directory, name, unused_number(directory, name))
    attempt.mkdir()
    synchronise(directory)
    return attempt


def unused_number(directory: Path, name: str | None = None) -> int:
    """Of an attempt that does not exist yet under this name, or under any: no greater one does, either."""
    there = directory.iterdir() if directory.exists() else ()
    found = [(path.stem, int(m[1])) for path in there if (m := _ATTEMPT.fullmatch(path.name))]
    return max((number for stem, number in found if name in (None, stem)), default=0) + 1


def attempt_path(directory: Path, name: str, number: int) -> Path:
    return directory / f"{name}.{number:04d}"


def durable_directory(attempt: Path) -> None:
    """Make an attempt's directory, for writers that have agreed on its name; the first one makes it."""
    attempt.mkdir(parents=True, exist_ok=True)
    synchronise(attempt.parent)


def commit(attempt: Path, writers: int, kind: str, facts: Mapping[str, Any]) -> Manifest:
    """Make an attempt count, once all `writers` have returned from write_shards. One process calls it.

    Receipts and the sizes of the files are checked; their bytes are when they are read. The receipts are
    removed, since the manifest says all that they did. Raises Damaged when a writer's part is not there or
    is another save's, FileExistsError when the attempt is committed already.
    """
    if (attempt / MANIFEST).exists():
        raise FileExistsError(f"{attempt} is committed already")
    names = {receipt_name(writer) for writer in range(writers)}
    found = {path.name for path in attempt.glob("writer-*.json")}
    if found != names:
        odd = ", ".join(sorted(found ^ names))
        raise Damaged(attempt, f"the receipts are not those of {writers} writers: {odd}")
    try:
        receipts = [Manifest.from_json((attempt / name).read_text()) for name in sorted(names)]
    except ValueError as error:
        raise Damaged(attempt, f"a receipt cannot be read: {error}") from None
    if any(receipt.facts != receipts[0].facts for receipt in receipts):
        raise Damaged(attempt, "the receipts are of different saves")
    pieces = tuple(piece for receipt in receipts for piece in receipt.pieces)
    files = {name: size for receipt in receipts for name, size in receipt.files.items()}
    manifest = Manifest.from_json(Manifest(kind, pieces, files, facts).to_json())  # as readers will see it
    form.check_files(attempt, manifest)
    write_durably(attempt / MANIFEST, manifest.to_json())
    for name in names:
        (attempt / name).unlink()
    return manifest


@dataclass
class Survey:
    """What lies in a directory of attempts."""

    intact: list[Path] = field(default_factory=list)  # newest first: by step, then attempt
    damaged: list[Damaged] = field(default_factory=list)
    uncommitted: list[Path] = field(default_factory=list)
    facts: dict[Path, Mapping[str, Any]] = field(default_factory=dict)  # of the intact ones

    def saved(self, path: Path) -> tuple[int, float]:
        """Step of an intact attempt, and when it was saved, in seconds since 1970."""
        facts = self.facts[path]
        return facts.get("step", 0), facts.get("time", (path / MANIFEST).stat().st_mtime)


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
            result.facts[path] = manifest.facts
            ages[path] = (manifest.facts.get("step", 0), int(match[1]))
        except FileNotFoundError:
            result.uncommitted.append(path)
        except Damaged as damage:
            result.damaged.append(damage)
    result.intact = sorted(ages, key=lambda path: ages[path], reverse=True)
    return result


def by_sha256(place: Path, sha256: str) -> Path:
    """The attempt whose manifest has the hash: `place` itself, or one in it. Raises ValueError."""
    attempts = [place] if (place / MANIFEST).exists() else candidates(place)
    seen = {path: form.load(path).sha256 for path in attempts}
    for path, found in seen.items():
        if found == sha256:
            return path
    others = ", ".join(f"{path.name} ({found[:12]}...)" for path, found in seen.items()) or "none at all"
    raise ValueError(f"{place} has none of sha256 {sha256[:12]}..., but {others}")


def candidates(directory: Path) -> list[Path]:
    """Committed attempts to restore from, newest first; what is damaged is left out (see `survey`)."""
    return survey(directory).intact


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `newest` (never less than two), and for good the first of every `seconds`
    (counted from 1970) and those at multiples of `steps`; 0 for neither."""

    newest: int = 3
    seconds: float = 0.0
    steps: int = 0

    def kept(self, saved: Sequence[tuple[int, float]]) -> set[int]:
        """Positions in `saved`: (step, seconds since 1970), newest first."""
        kept = set(range(min(max(self.newest, 2), len(saved))))
        oldest_first = [*enumerate(saved)][::-1]
        if self.seconds > 0:
            windows = {math.floor(when / self.seconds): n for n, (_, when) in enumerate(saved)}
            kept |= set(windows.values())
        if self.steps > 0:
            kept |= set({step: n for n, (step, _) in oldest_first if step % self.steps == 0}.values())
        return kept


def superfluous(directory: Path, retention: Retention, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """What `prune` would delete: see there."""
    found = survey(directory)
    kept = retention.kept([found.saved(path) for path in found.intact])
    old = [path for n, path in enumerate(found.intact) if n not in kept]
    stale = [path for path in found.uncommitted if _idle_seconds(path) > stale_seconds]
    return [path for path in old + stale if not _is_held(path)]


def prune(directory: Path, retention: Retention, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """Delete the intact attempts that are neither to be kept nor held; returns what was deleted.

    The manifest goes first, so that a crash in between leaves nothing that counts. Attempts that were
    never committed go when nothing in them has changed for `stale_seconds`. Damaged ones stay: an
    operator may still want them, and a file system that does not answer must not cost a checkpoint.
    """
    gone = [path for path in superfluous(directory, retention, stale_seconds) if _retire(path)]
    for path in gone:
        shutil.rmtree(path)
    return gone


def is_attempt(path: Path) -> bool:
    """Whether a directory is one attempt (or update), and not a directory of attempts."""
    return (path / MANIFEST).exists() or _ATTEMPT.fullmatch(path.name) is not None


@contextlib.contextmanager
def hold(attempt: Path) -> Iterator[None]:
    """While this lasts, `prune` leaves a committed attempt alone: it is being copied, for instance.

    A holder that dies holds it for HOLD_SECONDS more. Raises FileNotFoundError when it is not committed
    (any more).
    """
    mark = attempt / f"{_HOLD}{secrets.token_hex(8)}"
    mark.touch(exist_ok=False)
    over = threading.Event()
    refreshing = threading.Thread(target=_refresh, args=(mark, over), daemon=True)
    refreshing.start()
    try:
        (attempt / MANIFEST).stat()  # after the mark: who deletes looks for marks after hiding the manifest
        yield
    finally:
        over.set()
        refreshing.join()
        mark.unlink(missing_ok=True)


def _refresh(mark: Path, over: threading.Event) -> None:
    while not over.wait(HOLD_SECONDS / 10):
        with contextlib.suppress(OSError):  # the next one may get through
            os.utime(mark)


def _is_held(attempt: Path) -> bool:
    return any(time.time() - mark.lstat().st_mtime < HOLD_SECONDS for mark in attempt.glob(f"{_HOLD}*"))


def _retire(attempt: Path) -> bool:
    """Make an attempt count no longer; False when someone has come to hold it."""
    hidden = attempt / f".{MANIFEST}.retired"
    with contextlib.suppress(FileNotFoundError):  # it was never committed
        (attempt / MANIFEST).rename(hidden)
    if _is_held(attempt):
        with contextlib.suppress(FileNotFoundError):
            hidden.rename(attempt / MANIFEST)
        return False
    synchronise(attempt)
    return True


def writer_name(number: int) -> str:
    return f"writer-{number:05d}"


def receipt_name(number: int) -> str:
    return f"{writer_name(number)}.json"


def _idle_seconds(path: Path) -> float:
    try:
        return time.time() - max(p.lstat().st_mtime for p in (path, *path.iterdir()))
    except FileNotFoundError:  # it changes while we look
        return 0.0


def write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    synchronise(path.parent)


def synchronise(path: Path) -> None:
    """Make a file's contents, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
