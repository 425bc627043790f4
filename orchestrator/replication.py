"""Copies of checkpoints between the places that an operator can name.

here/step-00000020.0001     a checkpoint, or a directory: its newest one
RUN                         the newest of a run's island; of several, the one at --site
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.codecs import Mode
from checkpoints.ends import OpenSource, OpenTarget
from checkpoints.flat import FlatSource
from checkpoints.receive import FlatTarget
from checkpoints.throttle import Bucket, Throttle, unlimited
from checkpoints.transfer import Options, Outcome, Tell, replicate
from orchestrator import checkpoints_view
from orchestrator.units import format_bytes, format_duration, parse_bytes


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


def copy(
    source: OpenSource,
    target: Callable[[Throttle], OpenTarget],
    rate: int | None = None,
    streams: int = 2,
    compress: Mode = "auto",
    tell: Tell = lambda _: None,
) -> Outcome:
    """Copy a checkpoint, at most at `rate` bytes per second. Raises as transfer.replicate does."""
    throttle = Bucket(rate) if rate else unlimited
    return replicate(source, target(throttle), Options(streams, compress), tell)


def source_of(text: str, site: str | None) -> OpenSource:
    """What SOURCE names. Raises ValueError."""
    found = checkpoints_view.places(text, site)
    if len(found) != 1:
        raise ValueError(f"{text} has several sites: choose one with --site")
    return partial(FlatSource, found[0].path)


def target_of(text: str) -> Callable[[Throttle], OpenTarget]:
    """What TARGET names: given a throttle, it can be opened."""
    return lambda throttle: partial(FlatTarget, Path(text).absolute(), throttle)


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
