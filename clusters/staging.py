"""What was brought to a site: taken when it is whole, looked after, and asked for before a submission.

Under scratch: files at the names that run.toml gives them, `incoming/` while they arrive, and
`staged/verified.json`, which remembers what was verified so that asking costs a stat and no reading.
Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters import bundles
from clusters.paths import SitePaths, sync_directory
from clusters.pieces import Known, StagedFile, is_good, measure

# States of a file at its site.
THERE = "there"  # whole, verified, in its place
ARRIVING = "arriving"  # `have` bytes of it have arrived
UNREAD = "unread"  # not verified yet: ask again
OTHER = "other"  # something else lies in its place

_PATIENCE = 40.0  # seconds of reading per call: an agent that says nothing for a minute looks dead


class NotStaged(ValueError):
    """Something that a segment needs is not there, or is not what was verified."""


def take(
    site: SitePaths, files: Sequence[Mapping[str, Any]], replace: bool = False, seconds: float = _PATIENCE
) -> dict[str, Any]:
    """Verify what has arrived and put it in its place, as far as the time allows; then make room.

    Answers for each file its state, and what of it is there or has arrived; one piece at least is read.
    `replace` puts a file where another lies.
    """
    taker = _Taker(site, replace, time.monotonic() + seconds)
    answers = [taker.take(StagedFile.from_json(raw)) for raw in files]
    taker.known.save()
    return {"files": answers}


class _Taker:
    """One call's work: what is known, and until when it may read."""

    def __init__(self, site: SitePaths, replace: bool, deadline: float) -> None:
        self.site, self.replace, self.deadline = site, replace, deadline
        self.known = known_at(site)
        self.has_read = False

    def take(self, wanted: StagedFile) -> dict[str, Any]:
        target, part = self.site.scratch / wanted.path, self.site.scratch / wanted.part
        if target.exists():
            good = self._good(target, wanted) if target.stat().st_size == wanted.size else -1
            if good == len(wanted.pieces):
                return {"state": THERE, "age": round(time.time() - target.stat().st_mtime)}
            if good >= 0:
                return {"state": UNREAD, "have": good * wanted.piece}
            if not self.replace:
                return {"state": OTHER}
        return self._arriving(wanted, part, target)

    def _arriving(self, wanted: StagedFile, part: Path, target: Path) -> dict[str, Any]:
        part.parent.mkdir(parents=True, exist_ok=True)
        if not part.exists():  # its time tells whether it is the one that was verified
            part.touch()
        if part.stat().st_size > wanted.size:
            os.truncate(part, wanted.size)
        have = part.stat().st_size
        arrived = len(wanted.pieces) if have == wanted.size else have // wanted.piece
        good = self._good(part, wanted, arrived)
        if good < 0:
            return {"state": ARRIVING, "have": part.stat().st_size}
        if good < arrived:
            return {"state": UNREAD, "have": good * wanted.piece}
        if have < wanted.size:
            return {"state": ARRIVING, "have": have}
        self._place(wanted, part, target)
        return {"state": THERE, "age": 0}

    def _good(self, file: Path, wanted: StagedFile, arrived: int | None = None) -> int:
        """Pieces from the first on that are verified; -1 when one is not what it shall be.

        Of a file that is arriving, the bad piece and all behind it are thrown away.
        """
        arrived = len(wanted.pieces) if arrived is None else arrived
        told = self.known.facts(file)
        good = int(told["pieces"]) if told.get("sha256") == wanted.sha256 else 0
        good = min(good, arrived)
        while good < arrived and (not self.has_read or time.monotonic() < self.deadline):
            self.has_read = True
            if not is_good(file, wanted, good):
                if file.name.endswith(".part"):
                    os.truncate(file, good * wanted.piece)
                self.known.forget(file)
                return -1
            good += 1
        self._remember(file, wanted, good)
        return good

    def _remember(self, file: Path, wanted: StagedFile, good: int) -> None:
        self.known.remember(file, sha256=wanted.sha256, pieces=good, whole=good == len(wanted.pieces))

    def _place(self, wanted: StagedFile, part: Path, target: Path) -> None:
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        sync_directory(target.parent)
        self.known.forget(part)
        self._remember(target, wanted, len(wanted.pieces))


def known_at(site: SitePaths) -> Known:
    return Known(site.scratch / "staged" / "verified.json")


def adopt(site: SitePaths, paths: Sequence[str]) -> dict[str, Any]:
    """Size, SHA-256 and age (s) of files that lie here already: each is read once, and counts as verified.

    A path where there is nothing is answered with None. One file at least is read, then as time allows.
    """
    known, has_read = known_at(site), False
    found: dict[str, Any] = {}
    deadline = time.monotonic() + _PATIENCE
    for path in paths:
        file = site.scratch / path
        if not file.is_file():
            found[path] = None
            continue
        told = known.facts(file)
        if not told.get("whole"):
            if has_read and time.monotonic() > deadline:
                return {"files": found, "more": True}
            has_read, read = True, measure(file, path)
            known.remember(file, sha256=read.sha256, pieces=len(read.pieces), whole=True)
            told = {"sha256": read.sha256}
            known.save()
        facts = file.stat()
        age = round(time.time() - facts.st_mtime)
        found[path] = {"size": facts.st_size, "sha256": told["sha256"], "age": age}
    return {"files": found, "more": False}


def doubt(site: SitePaths, paths: Sequence[str]) -> dict[str, Any]:
    """Forget what was verified of these files: the next call of `take` reads them again."""
    known = known_at(site)
    for path in paths:
        known.forget(site.scratch / path)
    known.save()
    return {}


def refresh(site: SitePaths, paths: Sequence[str]) -> dict[str, Any]:
    """Make files young again for a purge that goes by age; what was verified of them stays so."""
    known = known_at(site)
    for path in paths:
        file = site.scratch / path
        told = known.facts(file)
        os.utime(file)
        if told:
            known.remember(file, **told)
    known.save()
    return {"refreshed": len(paths)}


def staged(site: SitePaths, needs: Mapping[str, Any]) -> dict[str, Any]:
    """Whether all is here that a segment needs; the age in seconds of the oldest. Raises NotStaged.

    `needs`: files as (path, size, SHA-256), a bundle's name or none, and what to type where something is
    missing. With a bundle its interpreter is answered, too.
    """
    known, now, oldest = known_at(site), time.time(), 0.0
    for path, size, sha256 in needs.get("files", ()):
        why = _wrong(known, site.scratch / path, size, sha256)
        if why:
            raise NotStaged(f"{path} {why}: type `{needs['advice']}`")
        oldest = max(oldest, now - (site.scratch / path).stat().st_mtime)
    if not needs.get("bundle"):
        return {"oldest": round(oldest)}
    bundle = bundles.find(site, needs["bundle"])
    if bundle is None or (why := bundles.wrong(bundle)):
        told = why if bundle else "is not there"
        raise NotStaged(f"bundle {needs['bundle']} {told}: type `{needs['advice']}`")
    return {"oldest": round(max(oldest, now - bundle["made"])), "python": bundle["python"]}


def _wrong(known: Known, file: Path, size: int, sha256: str) -> str:
    try:
        facts, there = known.facts(file), file.stat().st_size
    except FileNotFoundError:
        return "is not there"
    if facts.get("sha256") == sha256 and facts.get("whole") and there == size:
        return ""
    if there != size or (facts and facts.get("sha256") != sha256):
        return "has other contents than were staged"
    return "has changed since it was verified"
