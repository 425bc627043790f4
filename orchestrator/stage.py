"""`eurotrain stage`: brings to a site what segments need there and do not find.

Every step may be cut off anywhere and taken again: what has arrived is verified and gone on with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusters.connection import Connection, Parcel, Unreachable
from clusters.pieces import StagedFile, identity
from clusters.segment import Start
from clusters.staging import OTHER, THERE, UNREAD
from orchestrator.spec import load_run
from orchestrator.stock import Record, Stock, run_paths, staged_start, start_paths
from orchestrator.units import format_bytes

_ATTEMPTS = 5  # in a row without a single byte more
_PAUSE = 2.0  # seconds after the first of them; doubles
_TIMEOUT = 600.0  # seconds: a site may read slowly, and says nothing meanwhile


class Silent(OSError):
    """The site gave no answer, or could not do what it was asked."""


class NoRoom(OSError):
    """The site has no room for what is to be brought."""


@dataclass(frozen=True)
class Options:
    """What the operator says about the transfer."""

    bandwidth: int = 0  # bytes per second; 0: all there is
    replace: bool = False  # put files where others lie
    verify: bool = False  # read again at the site what was verified before
    pause: float = _PAUSE


class Listener:
    """Hears how it goes; this one does not care."""

    def say(self, text: str) -> None:
        """A line for the operator."""

    def meter(self, what: str, done: int, total: int) -> None:
        """Bytes of a step, out of so many."""


@dataclass
class Stager:
    """One site, from what is missing there to what is verified there."""

    site: str
    connection: Connection
    stock: Stock
    options: Options = field(default_factory=Options)
    listener: Listener = field(default_factory=Listener)
    old: float | None = None  # seconds: from that age on files are made young again; None: nobody purges
    sent: int = field(default=0, init=False)  # bytes that were put on their way
    _told_unknown: bool = field(default=False, init=False)

    def files(self, paths: Sequence[str], find: Callable[[str], Path | None]) -> list[dict[str, Any]]:
        """Bring files, or adopt those that lie at the site and not here; what was done with each.

        `find` gives a path's file here. Raises ValueError where one is neither here nor there, or where
        another lies in its place; OSError where it cannot be brought.
        """
        record = self.stock.load(self.site)
        sources = {path: source for path in paths if (source := find(path))}
        elsewhere = [path for path in paths if path not in sources]
        there = self._adopt(elsewhere, record) if elsewhere else {}
        if lacking := [path for path in elsewhere if path not in there]:
            raise ValueError(
                f"{lacking[0]} is neither here nor at {self.site}; --data tells where it is here"
            )
        brought = self.bring(self.stock.measure(sources), sources) if sources else []
        for facts in brought:
            here = str(sources[facts["path"]].absolute())
            record.files[facts["path"]] = {"size": facts["size"], "sha256": facts["sha256"], "source": here}
        self.stock.save(self.site, record)
        self._refresh([*brought, *there.values()])
        return [*brought, *there.values()]

    def files_there(self, paths: Sequence[str]) -> None:
        """Take files at the site as they are; of those that are not there the record says nothing new.

        Raises OSError where the site does not answer.
        """
        record = self.stock.load(self.site)
        self._adopt(paths, record)
        self.stock.save(self.site, record)

    # ---- what lies here

    def bring(self, wanted: Sequence[StagedFile], sources: Mapping[str, Path]) -> list[dict[str, Any]]:
        """Until all are verified at the site; each with its age there in seconds. Raises as `files`."""
        if self.options.verify:
            self.ask({"op": "doubt", "paths": [file.path for file in wanted]})
        ages: dict[str, int] = {}
        attempts, best, why = 0, -1, "nothing more arrives"
        while attempts < _ATTEMPTS:
            if attempts > 1:
                self.listener.say(f"{why}; trying again")
                time.sleep(self.options.pause * 2 ** (attempts - 2))
            try:
                left = self._take(wanted, ages)
                if not left:
                    return [{**_facts(file), "age": ages[file.path]} for file in wanted]
                if any(state["state"] == UNREAD for _, state in left):
                    continue
                missing = sum(file.size - state["have"] for file, state in left)
                self.check_room(missing, len(left))
                attempts, best = (1, missing) if best < 0 or missing < best else (attempts + 1, best)
                self._send(left, sources)
            except (Unreachable, Silent) as error:
                attempts, why = max(attempts, 1) + (best < 0), str(error)
        raise OSError(f"{why}; what has arrived stays there: stage it again")

    def _take(
        self, wanted: Sequence[StagedFile], ages: dict[str, int]
    ) -> list[tuple[StagedFile, dict[str, Any]]]:
        """Those that are not in their place yet, each with its state."""
        asked = [file for file in wanted if file.path not in ages]
        operation = {"op": "take", "files": [f.to_json() for f in asked], "replace": self.options.replace}
        told = self.ask(operation)["files"]
        left = []
        for file, state in zip(asked, told, strict=True):
            if state["state"] == THERE:
                ages[file.path] = state["age"]
            elif state["state"] == OTHER:
                raise ValueError(
                    f"{file.path} at {self.site} has other contents; rename it in run.toml, or --replace it"
                )
            else:
                left.append((file, state))
        if any(state["state"] == UNREAD for _, state in left):
            total = sum(file.size for file in wanted)
            unread = sum(f.size - s["have"] for f, s in left if s["state"] == UNREAD)
            self.listener.meter("verifying", total - unread, total)
        return left

    def _send(self, left: Sequence[tuple[StagedFile, dict[str, Any]]], sources: Mapping[str, Path]) -> None:
        """Raises Unreachable when it breaks off, ValueError when a file changes under our hands."""
        before = {file.path: identity(sources[file.path]) for file, _ in left}
        parcels = [
            Parcel(sources[file.path].resolve(), file.part, state["have"], file.size) for file, state in left
        ]
        total = sum(p.size for p in parcels)
        have = sum(p.have for p in parcels)
        moved = 0

        def progress(done: int) -> None:
            nonlocal moved
            moved = done
            self.listener.meter("sending", have + done, total)

        try:
            self.connection.carry(parcels, progress, self.options.bandwidth)
        finally:
            self.sent += moved
        for path, facts in before.items():
            if identity(sources[path]) != facts:
                raise ValueError(f"{sources[path]} has changed while it was brought: stage it again")

    def check_room(self, size: int, files: int) -> None:
        """Raises NoRoom when so many bytes and files do not fit; says so where nobody knows."""
        told = self.ask({"op": "room"})
        limits = [("free", told["free_bytes"], told["free_files"])]
        limits += [(f"left to {q['whose']}", q["bytes_left"], q["files_left"]) for q in told["quotas"]]
        where = f"{self.site}: {told['filesystem']}"
        for what, bytes_left, files_left in limits:
            if bytes_left is not None and size > bytes_left:
                short = f"{format_bytes(size)} more are needed, {format_bytes(max(0, bytes_left))} are {what}"
                raise NoRoom(f"{where}: {short}")
            if files_left is not None and files > files_left:
                raise NoRoom(f"{where}: {files} more files are needed, {max(0, files_left)} are {what}")
        if told["unknown"] and not self._told_unknown:
            self._told_unknown = True
            self.listener.say(f"{where}: whether a quota leaves room is unknown ({told['unknown']})")

    # ---- what lies at the site

    def _refresh(self, files: Sequence[Mapping[str, Any]]) -> None:
        old = [file["path"] for file in files if self.old is not None and file["age"] >= self.old]
        if old:
            self.ask({"op": "refresh", "paths": old})
            self.listener.say(f"{self.site}: {len(old)} files were near the age of purging: made young again")

    def _adopt(self, paths: Sequence[str], record: Record) -> dict[str, dict[str, Any]]:
        """Files that are at the site count as they are, unless they should be others; into the record."""
        found: dict[str, Any] = {}
        more = True
        while more:
            told = self.ask({"op": "adopt", "paths": [p for p in paths if p not in found]})
            found.update(told["files"])
            more = told["more"]
        there = {}
        for path, facts in found.items():
            known = record.files.get(path)
            if facts is None:
                continue
            if known and known["sha256"] != facts["sha256"] and not self.options.replace:
                raise ValueError(f"{path} at {self.site} is not what was staged before; --replace takes it")
            contents = {"size": facts["size"], "sha256": facts["sha256"]}
            record.files[path] = {**contents, "source": known["source"] if known else ""}
            there[path] = {"path": path, **facts, "adopted": True}
        return there

    def ask(self, operation: dict[str, Any]) -> dict[str, Any]:
        """Raises Silent, also where the site could not do it."""
        try:
            (result,) = self.connection.exchange([operation], timeout=_TIMEOUT)
        except Unreachable as error:
            raise Silent(str(error)) from None
        if not result["ok"]:
            raise Silent(f"{self.site}: {result['error']}")
        return result


def run_files(stager: Stager, run_toml: Path, data: Path | None = None) -> list[dict[str, Any]]:
    """Stage what a run reads: `data` (default: where run.toml lies) has the same paths as the site's scratch.

    What is not there is taken from where it was staged from before. Raises as Stager.files.
    """
    spec = load_run(run_toml)
    remembered = stager.stock.load(stager.site).files
    below = data or run_toml.parent

    def find(path: str) -> Path | None:
        before = remembered.get(path, {}).get("source")
        candidates = [below / path, *([Path(before)] if before and data is None else [])]
        return next((c for c in candidates if c.is_file()), None)

    start = _start_paths(spec.start, below, stager.stock.load(stager.site))
    return stager.files([*run_paths(spec.segment_data(), spec.data.tokenizer), *start], find)


def _start_paths(start: Start | None, below: Path, record: Record) -> list[str]:
    """Of the checkpoint that lies here, or of one that was staged before. Raises ValueError."""
    try:
        return start_paths(start, below)
    except ValueError:
        with suppress(KeyError):
            return staged_start(start, record)
        raise


def _facts(file: StagedFile) -> dict[str, Any]:
    return {"path": file.path, "size": file.size, "sha256": file.sha256, "adopted": False}
