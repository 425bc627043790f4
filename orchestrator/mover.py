"""Carries outer updates between sites: store and forward, verified before anyone hears of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpoints import blocks
from checkpoints.manifest import MANIFEST, Damaged, Manifest, load
from clusters.connection import Connection
from clusters.paths import SitePaths
from clusters.rounds import ClosedRound, Contribution


class Refused(Exception):
    """An update arrived, and is not what its island said it was: it takes no part in the round."""


def collect(connection: Connection, run: str, number: int, part: Contribution, folder: Path) -> int:
    """Fetch an island's update into `folder` and verify it; bytes carried (0 when it is here already).

    Raises Unreachable (try again later) or Refused.
    """
    if _verified(folder, part):
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outbox = SitePaths(Path()).outbox(run, number, part.site)
    carried = connection.fetch(f"{outbox}/{MANIFEST}", folder / MANIFEST)
    for name in _manifest(folder, part).files:
        carried += connection.fetch(f"{outbox}/{name}", folder / name)
    verify(folder, part)
    return carried


def deliver(
    connection: Connection, closed: ClosedRound, site: str, folders: dict[str, Path], note: Path
) -> int:
    """Bring a closed round to a site: the other islands' updates, and the manifest last; bytes carried.

    Raises Unreachable; delivering twice writes the same bytes again.
    """
    paths, carried = SitePaths(Path()), 0
    for other in (c.site for c in closed.contributions if c.site != site):
        target = paths.inbox(closed.run, closed.number, other)
        files = sorted(p for p in folders[other].iterdir() if p.name != MANIFEST)
        for path in [*files, folders[other] / MANIFEST]:
            carried += connection.push(path, f"{target}/{path.name}")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(closed.to_json())
    return carried + connection.push(note, str(paths.closed_round(closed.run, closed.number)))


def verify(folder: Path, part: Contribution) -> None:
    """Check every byte of an update against its manifest. Raises Refused."""
    manifest = _manifest(folder, part)
    try:
        blocks.verify(folder, manifest)
    except Damaged as error:
        raise Refused(f"{part.site}: {error}") from error


def _manifest(folder: Path, part: Contribution) -> Manifest:
    try:
        manifest = load(folder)
    except Damaged as error:
        raise Refused(f"{part.site}: {error}") from error
    if manifest.sha256 != part.sha256:
        raise Refused(f"{part.site}: the update's manifest is not the one its island announced")
    return manifest


def _verified(folder: Path, part: Contribution) -> bool:
    try:
        verify(folder, part)
    except (OSError, Refused):
        return False
    return True
