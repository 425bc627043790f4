"""How `eurotrain stage` shows what it does, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from orchestrator.stage import Listener, Stager
from orchestrator.units import format_bytes, format_duration

_EVERY_SECONDS = 10.0  # lines, where there is no terminal


def facts(
    stager: Stager, bundle: Mapping[str, Any], files: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """What `--json` prints."""
    total = sum(file["size"] for file in files)
    return {
        "site": stager.site,
        "bundle": dict(bundle) or None,
        "files": [dict(file) for file in files],
        "bytes": total,
        "sent_bytes": stager.sent,
        "seconds": round(seconds, 3),
    }


def table(facts: Mapping[str, Any]) -> Table:
    sent, seconds = format_bytes(facts["sent_bytes"]), format_duration(facts["seconds"])
    title = f"staged at {facts['site']}: {format_bytes(facts['bytes'])}, {sent} of it sent, in {seconds}"
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for column, justify in (("file", "left"), ("size", "right"), ("SHA-256", "left"), ("", "left")):
        drawn.add_column(column, justify=justify)  # type: ignore[arg-type]
    if bundle := facts["bundle"]:
        what = f"bundle: {bundle['kind']}, {bundle['words']}"
        drawn.add_row(what, format_bytes(bundle["bytes"]) if bundle["bytes"] else "", bundle["id"], "ready")
    for file in facts["files"]:
        how = "was there" if file["adopted"] else "verified"
        drawn.add_row(file["path"], format_bytes(file["size"]), file["sha256"][:16], how)
    return drawn


class Lines(Listener):
    """A line every few seconds: done, rate, time left."""

    def __init__(
        self, echo: Callable[[str], None] = lambda text: click.echo(text, err=True),
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._echo, self._now = echo, now
        self._what, self._first, self._began, self._told = "", 0, 0.0, 0.0

    def say(self, text: str) -> None:
        self._echo(text)

    def meter(self, what: str, done: int, total: int) -> None:
        now = self._now()
        if what != self._what:
            self._what, self._first, self._began, self._told = what, done, now, now
        elif now - self._told >= _EVERY_SECONDS or done >= total:
            self._told = now
            rate = (done - self._first) / max(now - self._began, 1e-9)
            left = f", {format_duration((total - done) / rate)} left" if rate and done < total else ""
            told = f"{format_bytes(done)} of {format_bytes(total)}, {format_bytes(round(rate))}/s{left}"
            self._echo(f"{what}: {told}")


class Bars(Listener):
    """A bar for each step, with rate and time left."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        self._progress = Progress(
            *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text)

    def meter(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, completed=0)
        self._progress.update(self._tasks[what], completed=done, total=total)
