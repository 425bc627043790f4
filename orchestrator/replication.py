"""Copies of checkpoints between the places that an operator can name.

    here/step-00000020.0001    a checkpoint, or a directory: its newest one
    leonardo:some/where        the same at a site of sites.toml; below its scratch where it is not absolute
    s3://bucket/some/where     a store of packs: any URL that fsspec opens, with the package that it needs
    RUN                        the newest of a run's island; of several, the one at --site

A copy between two sites passes through this machine, chunk by chunk, compressed or not as it came: sites
rarely let each other in. Where one does, run eurotrain there.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.replication.compression import Mode
from checkpoints.replication.ends import OpenSource, OpenTarget
from checkpoints.replication.flat import FlatSource
from checkpoints.replication.packed import PackSource, PackTarget
from checkpoints.replication.packs import Store
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.remote import MODULE, RemoteSource, RemoteTarget, Start
from checkpoints.replication.throttle import Bucket, Throttle, unlimited
from checkpoints.replication.transfer import Options, Outcome, Tell, replicate
from checkpoints.replication.wire import Lost
from clusters.bundles import prefix
from clusters.connection import Unreachable
from clusters.paths import SitePaths
from clusters.site import Site
from clusters.ssh import SshConnection
from orchestrator.desk import Desk
from orchestrator.home import Home
from orchestrator.stock import Stock
from orchestrator.suggest import unknown
from orchestrator.units import format_bytes, format_duration, parse_bytes


@dataclass(frozen=True)
class End:
    """One end of a copy: a directory here, or where `start` starts the far end, or the URL of a store."""

    path: str
    start: Start | None = None

    @property
    def is_store(self) -> bool:
        return "://" in self.path

    def source(self, throttle: Throttle) -> OpenSource:
        if self.is_store:
            return partial(PackSource, self.path, throttle=throttle)
        if self.start is None:
            return partial(FlatSource, Path(self.path))
        return partial(RemoteSource, self.start, self.path, throttle=throttle)

    def target(self, throttle: Throttle) -> OpenTarget:
        if self.is_store:
            return partial(PackTarget, Store(self.path), throttle)
        if self.start is None:
            return partial(FlatTarget, Path(self.path).absolute(), throttle)
        return partial(RemoteTarget, self.start, self.path, throttle)


def copy(
    source: End,
    target: End,
    rate: int | None = None,
    streams: int = 2,
    compress: Mode = "auto",
    tell: Tell = lambda _: None,
) -> Outcome:
    """Copy the newest checkpoint of `source` into the directory `target`; `tell` hears how far it is.

    `rate` bytes per second cross at most: on the way to the target, or where that is here on the way from the
    source. When this returns, every byte at the target has been read back and the checkpoint counts there;
    when it raises (Damaged or another ValueError: in vain; OSError: a link, a disk), nothing counts that did
    not before, and the same call goes on with what has come. Copying again what is there only verifies it.
    """
    throttle = Bucket(rate) if rate else unlimited
    crosses = [end.is_store or end.start is not None for end in (source, target)]
    comes_in = crosses == [True, False]
    open_source = source.source(throttle if comes_in else unlimited)
    open_target = target.target(unlimited if comes_in else throttle)
    return replicate(open_source, open_target, Options(streams, compress, rate=rate), tell)


def source_of(text: str, site: str | None, desk: Desk) -> End:
    """What SOURCE names. Raises ValueError."""
    if (there := _elsewhere(text, desk)) is None and not Path(text).is_dir():
        return _of_run(text, site, desk)
    if site is not None:
        raise ValueError(f"--site {site}: {text} is a place; a site goes with the name of a run")
    return there or End(text)


def target_of(text: str, desk: Desk) -> End:
    """What TARGET names: it need not be there. Raises ValueError."""
    return _elsewhere(text, desk) or End(text)


def site_end(site: Site, path: str, home: Home) -> End:
    """A path at a site, below its scratch where it is not absolute. Raises ValueError.

    The far end runs from what was staged there, or by the interpreter that the operator names.
    """
    whole = str(site.scratch / path)
    connection = site.connect(home.root)
    if not isinstance(connection, SshConnection):
        return End(whole)
    python = Stock(home.staged).load(site.name).bundle.get("python") or site.python
    if not python:
        raise ValueError(
            f"{site.name}: eurotrain is not there yet: `eurotrain stage {site.name}` brings it, "
            f"or name in {home.sites} as `python` one that has it installed"
        )
    command = shlex.join([*prefix(site.own.modules), python])
    return End(whole, partial(_start, connection, command))


def parse_rate(text: str) -> int:
    """ "100MB/s" -> 100_000_000 bytes per second. Raises ValueError, one line."""
    size, slash, unit = text.partition("/")
    try:
        rate = parse_bytes(size) if (slash, unit.strip()) == ("/", "s") else 0
    except ValueError:
        rate = 0
    if not rate:
        raise ValueError(f'{text!r} is not a rate such as "100MB/s" (more than 0)')
    return rate


def facts(outcome: Outcome) -> dict[str, Any]:
    """For --json: bytes but `carried` are those of the checkpoint, before compression."""
    return {
        "checkpoint": outcome.name,
        "path": outcome.where,
        "already": outcome.already,
        "bytes": outcome.bytes,
        "chunks": outcome.chunks,
        "sent": outcome.sent,
        "reused": outcome.reused,
        "carried": outcome.carried,
        "repaired_chunks": outcome.repaired,
        "links_lost": outcome.relinked,
        "seconds": round(outcome.seconds, 3),
    }


def sentence(outcome: Outcome) -> str:
    """For people."""
    if outcome.already:
        return f"{outcome.where}: is there already, and every byte of it is right"
    crossed = f"{format_bytes(outcome.carried)} crossed" if outcome.sent else "nothing had to cross"
    kept = f", {format_bytes(outcome.reused)} were there already" if outcome.reused else ""
    took = format_duration(outcome.seconds)
    return f"{outcome.where}: {format_bytes(outcome.bytes)}, verified; {crossed} in {took}{kept}"


def _start(connection: SshConnection, python: str) -> list[str]:
    try:
        return connection.pipe(python, MODULE)
    except Unreachable as error:
        raise Lost(str(error)) from error


def _elsewhere(text: str, desk: Desk) -> End | None:
    if "://" in text:
        return End(text)
    name, colon, path = text.partition(":")
    if not colon or "/" in name or Path(text).exists():
        return None
    sites = desk.sites()
    if name not in sites:
        raise ValueError(f"{text}: {unknown('site', name, sites)}")
    if not path:
        raise ValueError(f"{text}: name a directory behind the colon, such as {text}checkpoints/RUN/SITE")
    return site_end(sites[name], path, desk.home)


def _of_run(name: str, site: str | None, desk: Desk) -> End:
    run, islands = desk.islands(name, site)
    if site is None and len(islands) > 1:
        raise ValueError(f"run {run} has several sites ({', '.join(islands)}): choose one with --site")
    wanted, sites = site or islands[0], desk.sites()
    if wanted not in sites:
        raise ValueError(f"{desk.home.sites}: {unknown('site', wanted, sites)}, which run {run} uses")
    return site_end(sites[wanted], str(SitePaths(Path()).checkpoints(run, wanted)), desk.home)
