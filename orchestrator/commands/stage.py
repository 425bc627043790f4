"""eurotrain stage: bring to a site what its segments need, and see it verified there."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.frame import as_json, command, emit

if TYPE_CHECKING:
    from orchestrator.stage import Listener

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("site")
@click.option(
    "--run", "runs", type=_FILE, multiple=True, metavar="RUN.TOML", help="Bring what it reads, too."
)
@click.option("--data", type=_FOLDER, help="Where the run's paths begin here; default: beside run.toml.")
@click.option("--bwlimit", metavar="SIZE", help='Bytes per second at most, such as "20MB".')
@click.option("--replace", is_flag=True, help="Put files where others of their names lie.")
@click.option("--verify", is_flag=True, help="Read again at the site what was verified before.")
@as_json
@command
def stage(
    site: str, runs: tuple[Path, ...], data: Path | None, bwlimit: str | None, replace: bool, verify: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Bring to a site what segments need: eurotrain with all it imports, text and tokenizer of runs.

    Everything is verified there; what is there already is not sent, and what was cut off is gone on with.
    """
    from orchestrator import stage as staging
    from orchestrator import stage_view as view
    from orchestrator.desk import Desk
    from orchestrator.units import parse_bytes

    options = staging.Options(parse_bytes(bwlimit) if bwlimit else 0, replace, verify)
    began = time.monotonic()
    with _listening(quiet=as_json) as listener:
        desk = Desk.open()
        stager = desk.stager(site, options, listener)
        bundle = desk.stage_bundle(site, stager)
        files = [facts for run in runs for facts in staging.run_files(stager, run, data)]
    facts = view.facts(stager, bundle, files, time.monotonic() - began)
    emit(facts, lambda: view.table(facts), wants_json=as_json)


@contextmanager
def _listening(*, quiet: bool) -> Iterator[Listener]:
    """Shows a bar with rate and time left on a terminal, lines elsewhere, on standard error."""
    from orchestrator.stage import Listener
    from orchestrator.stage_view import Bars, Lines

    if quiet:
        yield Listener()
    elif sys.stderr.isatty():
        with Bars() as bars:
            yield bars
    else:
        yield Lines()
