"""eurotrain checkpoint ..."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.checkpoint_interop import export, import_
from orchestrator.commands.checkpoint_replicate import replicate
from orchestrator.commands.frame import DONE, FAILED, as_json, command, emit


@click.group()
def checkpoint() -> None:
    """List, examine and keep checkpoints.

    PLACE is a directory of checkpoints, one checkpoint, or the name of a run.
    """


place = click.argument("place")
site = click.option("--site", help="Of a run: the checkpoints of this site alone.")


@checkpoint.command(name="list")
@place
@site
@as_json
@command
def list_(place: str, site: str | None, as_json: bool) -> None:
    """Show what checkpoints there are, newest first; of a remote site, what it told of them."""
    from orchestrator import checkpoints_view as view

    rows = view.listing(place, site)
    emit(rows, lambda: view.list_table(rows), wants_json=as_json)


@checkpoint.command()
@place
@site
@click.option("--tensors", is_flag=True, help="Every tensor with its shape, too (--json always has them).")
@as_json
@command
def show(place: str, site: str | None, tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint (the newest one) says of itself."""
    from orchestrator import checkpoints_view as view

    facts = view.shown(place, site)
    emit(facts, lambda: view.show_tables(facts, tensors=tensors), wants_json=as_json)


@checkpoint.command()
@place
@site
@as_json
@command
def verify(place: str, site: str | None, as_json: bool) -> int:
    """Read every byte and compare it with its checksum; ends with 1 when something is damaged."""
    from orchestrator import checkpoints_view as view
    from orchestrator.progress import bytes_done

    paths = [path for found in view.places(place, site) for path in found.attempts]
    if not paths:
        raise ValueError(f"{place}: no committed checkpoint")
    with bytes_done("verifying", view.to_read(paths)) as was_read:
        rows = view.verified(paths, was_read)
    emit(rows, lambda: view.verify_table(rows), wants_json=as_json)
    return FAILED if any(row["damage"] for row in rows) else DONE


@checkpoint.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel ranks of the new layout.")
@click.option("--pp", type=int, default=1, show_default=True, help="Pipeline stages.")
@click.option("--vpp", type=int, default=1, show_default=True, help="Virtual stages of each.")
@click.option("--dp", type=int, default=1, show_default=True, help="Data-parallel ranks.")
@click.option("--cp", type=int, default=1, show_default=True, help="Context-parallel ranks.")
@click.option("--ep", type=int, default=1, show_default=True, help="Expert-parallel ranks.")
@click.option("--distributed-optimizer", is_flag=True, help="Cut Adam's state over data-parallel ranks.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True)
@as_json
@command
def reshard(source: Path, target: Path, workers: int, as_json: bool, **layout: int | bool) -> None:
    """Write a checkpoint again as the ranks of another layout would have, for them to read in one go.

    Not needed to change layouts: every layout reads every checkpoint. SOURCE is a checkpoint or a directory
    of them (the newest is taken), TARGET a directory. The same command again goes on after a crash.
    """
    from orchestrator import checkpoints_view as view
    from orchestrator.reshard import reshard as run

    facts = run(view.newest(source), target, layout, workers)
    emit(facts, lambda: view.reshard_table(facts), wants_json=as_json)


@checkpoint.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep", type=click.IntRange(min=2), default=3, show_default=True, help="So many newest.")
@click.option("--yes", is_flag=True, help="Do not ask before something is deleted.")
@as_json
@command
def prune(directory: Path, keep: int, yes: bool, as_json: bool) -> None:
    """Delete old checkpoints, and attempts that were never committed; damaged ones stay."""
    from checkpoints import attempts

    if attempts.is_attempt(directory):
        raise ValueError(f"{directory} is one checkpoint: name the directory that it lies in")
    retention = attempts.Retention(newest=keep)
    gone = attempts.superfluous(directory, retention)
    if gone and not yes:
        click.echo("\n".join(map(str, gone)), err=True)
        click.confirm(f"Delete these {len(gone)}?", abort=True, err=True)
    deleted = [str(path) for path in (attempts.prune(directory, retention) if gone else [])]
    emit(deleted, lambda: "\n".join(deleted) or "nothing to delete", wants_json=as_json)


for part in (replicate, import_, export):
    checkpoint.add_command(part)
