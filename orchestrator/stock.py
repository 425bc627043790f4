"""What was staged at each site, as far as this operator knows: `$EUROTRAIN_HOME/staged/`.

A memory only: whether it is still there, the site itself is asked before every submission.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.attempts import by_sha256
from checkpoints.manifest import MANIFEST, load
from clusters.paths import write_atomically
from clusters.pieces import Known, StagedFile, measure
from clusters.segment import Data, Start

Content = tuple[str, int, str]  # path under scratch, bytes, SHA-256


@dataclass
class Record:
    """One site's part: files by their path there, and the bundle that segments run from."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # size, sha256, source (here, or "")
    bundle: dict[str, Any] = field(default_factory=dict)  # id, kind, python; empty: none

    def contents(self, paths: Iterable[str]) -> list[Content]:
        """Of these paths. Raises KeyError for one that was never staged."""
        told = {path: self.files[path] for path in paths}
        return [(path, facts["size"], facts["sha256"]) for path, facts in sorted(told.items())]


@dataclass(frozen=True)
class Stock:
    """The records, and what was measured of files here."""

    root: Path  # $EUROTRAIN_HOME/staged

    def load(self, site: str) -> Record:
        """An empty one where nothing was staged, or where the file is not a record."""
        try:
            return Record(**json.loads(self._path(site).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return Record()

    def save(self, site: str, record: Record) -> None:
        write_atomically(self._path(site), json.dumps(asdict(record), indent=1, sort_keys=True))

    def measure(self, sources: dict[str, Path]) -> list[StagedFile]:
        """Files here, by the path they shall have there; each is read once. Raises OSError."""
        known, found = Known(self.root / "measured.json"), []
        for path, source in sources.items():
            told = known.facts(source)
            if not told:
                told = measure(source, path).to_json()
                known.remember(source, **told)
                known.save()
            found.append(StagedFile.from_json({**told, "path": path}))
        return found

    def _path(self, site: str) -> Path:
        return self.root / f"{site}.json"


def start_paths(start: Start | None, below: Path) -> list[str]:
    """Files of the checkpoint that a run begins with, found here. Raises ValueError where it is not."""
    if start is None:
        return []
    attempt = by_sha256(below / start.checkpoint, start.sha256)
    folder = attempt.relative_to(below).as_posix()
    return [f"{folder}/{name}" for name in (MANIFEST, *load(attempt).files)]


def staged_start(start: Start | None, record: Record) -> list[str]:
    """The same by what was staged. Raises KeyError where it never was."""
    if start is None:
        return []
    for path, facts in record.files.items():
        folder, _, name = path.rpartition("/")
        inside = f"{folder}/".startswith(f"{start.checkpoint.rstrip('/')}/")
        if inside and name == MANIFEST and facts["sha256"] == start.sha256:
            return [path for path in record.files if path.rpartition("/")[0] == folder]
    raise KeyError(start.checkpoint)


def run_paths(data: Data, tokenizer: str | None) -> list[str]:
    """Files that a run needs, under scratch."""
    paths = [f"{prefix}{suffix}" for prefix in data.prefixes for suffix in (".bin", ".idx")]
    return [*paths, *([tokenizer] if tokenizer else [])]
