"""The contract between controller, agent, supervisor and ranks: which file lies where.

Under a site's scratch directory (`SitePaths`):

    segments/<key>/segment.json   what to run (clusters/segment.py), written once, before submission
                   claim.json     who runs it: created exclusively, so a second claimant exits
                   heartbeat      touched by the supervisor every second
                   stop           present: the controller asks the segment to checkpoint and exit
                   drain          present: the supervisor asks the ranks to do so
                   exit.json      how the job ended: the accounting record of a local site
                   events/*.jsonl one file per writer: see clusters/events.py
                   logs/          what ranks and supervisor printed
    checkpoints/<run>/<site>/     the island's checkpoints
    outbox/<run>/round-000001/<site>/   an island's update, waiting for the controller
    inbox/<run>/round-000001/<site>/    the other islands' updates, brought by the controller
    rounds/<run>/round-000001.json      a closed round (clusters/rounds.py), brought last
    orders/                       in which order the text is read (parallelism/data.py); may be deleted

Standard library only, and Python 3.9: this file travels to sites with an old interpreter.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping  # noqa: UP035 - Python 3.9 at the sites

from clusters.segment import Segment


@dataclass(frozen=True)
class SegmentPaths:
    """Where the files of one segment lie."""

    root: Path

    @property
    def segment(self) -> Path:
        return self.root / "segment.json"

    @property
    def claim(self) -> Path:
        return self.root / "claim.json"

    @property
    def heartbeat(self) -> Path:
        return self.root / "heartbeat"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
    def drain(self) -> Path:
        return self.root / "drain"

    @property
    def exit(self) -> Path:
        return self.root / "exit.json"

    @property
    def events(self) -> Path:
        return self.root / "events"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def load(self) -> Segment:
        """Raises FileNotFoundError or ValueError."""
        return Segment.from_json(self.segment.read_text())


@dataclass(frozen=True)
class SitePaths:
    """Where a site keeps what: see the module's first lines."""

    scratch: Path

    def segment(self, key: str) -> SegmentPaths:
        return SegmentPaths(self.scratch / "segments" / key)

    def checkpoints(self, run: str, site: str) -> Path:
        return self.scratch / "checkpoints" / run / site

    def outbox(self, run: str, number: int, site: str) -> Path:
        return self.scratch / "outbox" / run / f"round-{number:06d}" / site

    def inbox(self, run: str, number: int, site: str) -> Path:
        return self.scratch / "inbox" / run / f"round-{number:06d}" / site

    def closed_round(self, run: str, number: int) -> Path:
        return self.scratch / "rounds" / run / f"round-{number:06d}.json"


def write_atomically(path: Path, text: str) -> None:
    """Write `path` so that readers see the old text or the new, and a power cut loses neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _write_durably(temporary, text)
    temporary.replace(path)
    sync_directory(path.parent)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Of a file's contents, read in blocks. Raises OSError."""
    whole = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


def claim(paths: SegmentPaths, record: Mapping[str, Any]) -> bool:
    """Take the segment's key for this incarnation; False when another has it.

    The record appears whole or not at all: it is written aside and linked into place.
    """
    paths.root.mkdir(parents=True, exist_ok=True)
    temporary = paths.claim.with_name(f".claim.{os.getpid()}.{time.monotonic_ns()}.tmp")
    _write_durably(temporary, json.dumps(dict(record)))
    try:
        os.link(temporary, paths.claim)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_directory(paths.root)
    return True
