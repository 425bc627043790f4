"""Carries outer updates between sites: store and forward, verified before anyone hears of them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.manifest import MANIFEST, Damaged, Manifest, load
from checkpoints.update import Header, inspect
from clusters.connection import Connection
from clusters.paths import SitePaths
from clusters.rounds import ClosedRound, Contribution


class Refused(Exception):
    """An update arrived, and is not what its island said it was: it takes no part in the round."""


@dataclass(frozen=True)
class Collected:
    """What a collection brought."""

    bytes: int  # 0 when the update was here already
    norm: float  # of the update, inf when it is not finite


def collect(connection: Connection, part: Contribution, place: Mapping[str, Any], folder: Path) -> Collected:
    """Fetch an island's update into `folder` and verify it. `place` is what its header has to say, "run"
    and "round" at least.

    Raises Unreachable (try again later) or Refused.
    """
    with contextlib.suppress(OSError, Refused):
        return Collected(0, verify(folder, part, place))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outbox = SitePaths(Path()).outbox(place["run"], place["round"], part.site)
    carried = connection.fetch(f"{outbox}/{MANIFEST}", folder / MANIFEST)
    for name in _manifest(folder, part).files:
        carried += connection.fetch(f"{outbox}/{name}", folder / name)
    return Collected(carried, verify(folder, part, place))


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


def verify(folder: Path, part: Contribution, place: Mapping[str, Any]) -> float:
    """Check an update's header, and every byte against its manifest; its norm. Raises Refused."""
    manifest = _manifest(folder, part)
    try:
        _check(Header.of(manifest), {**place, "site": part.site, "tokens": part.tokens})
        return inspect(folder, manifest)
    except ValueError as error:  # Damaged is one
        raise Refused(f"{part.site}: {error}") from error


def sketch(folder: Path) -> Mapping[str, list[float]]:
    """How the base of a collected update looks to its island."""
    return Header.of(load(folder)).sketch


def _check(header: Header, expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        found = getattr(header, name)
        if found != value:
            raise ValueError(f"the update's {name} is {found!r}, not {value!r}")


def _manifest(folder: Path, part: Contribution) -> Manifest:
    try:
        manifest = load(folder)
    except Damaged as error:
        raise Refused(f"{part.site}: {error}") from error
    if manifest.sha256 != part.sha256:
        raise Refused(f"{part.site}: the update's manifest is not the one its island announced")
    return manifest
