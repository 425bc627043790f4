"""An island's contribution as files: committed once, never changed, and checked before it is applied."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from checkpoints.attempts import commit
from checkpoints.manifest import MANIFEST, Manifest
from checkpoints.reader import Reader
from checkpoints.update import Header
from clusters.paths import sync_directory
from clusters.rounds import ClosedRound, Contribution


def committed_update(outbox: Path, header: Header) -> Manifest | None:
    """The contribution that lies in `outbox`; None when there is none. One process calls it.

    Raises ValueError when it is not of the run, site, round and base that `header` tells, or is damaged.
    """
    if not (outbox / MANIFEST).exists():
        return None
    manifest = Reader(outbox).manifest
    place = {name: getattr(header, name) for name in ("run", "site", "round", "base")}
    _check_equal(outbox, manifest, place)
    return manifest


def commit_update(attempt: Path, outbox: Path, writers: int, header: Header) -> Manifest:
    """Make what the writers left in `attempt` (`begin(outbox.parent, outbox.name)`) this round's one
    contribution, and return what counts. One process calls it.

    A contribution never changes once it is committed, because it may have been carried away already: when
    an earlier incarnation has left one, that one stays and the attempt is removed. Raises as `commit` and
    `committed_update` do.
    """
    if committed_update(outbox, header) is None:
        commit(attempt, writers, "update", header.to_facts())
        attempt.rename(outbox)
        sync_directory(outbox.parent)
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(attempt)
    manifest = committed_update(outbox, header)
    assert manifest is not None
    return manifest


def check_header(
    path: Path, manifest: Manifest, closed: ClosedRound, listed: Contribution, reset_from: str
) -> None:
    """Raises ValueError when the update at `path` is not the one that the round lists."""
    if manifest.sha256 != listed.sha256:
        found = manifest.sha256[:12]
        raise ValueError(f"{path}: its manifest has sha256 {found}, the round lists {listed.sha256[:12]}")
    place = {"run": closed.run, "site": listed.site, "round": closed.number, "base": closed.base}
    _check_equal(path, manifest, {**place, "tokens": listed.tokens, "state": listed.site == reset_from})


def _check_equal(path: Path, manifest: Manifest, expected: Mapping[str, object]) -> None:
    try:
        header = Header.of(manifest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, value in expected.items():
        found = getattr(header, name)
        if found != value:
            raise ValueError(f"{path}: its {name} is {found!r}, not {value!r}")
