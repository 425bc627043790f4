"""eurotrain bench ..."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.frame import as_json, command, emit


@click.group()
def bench() -> None:
    """Measure beside a named peer, in one run, with ratios and their spread."""


repetitions = click.option("-n", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True)


@bench.command()
@repetitions
@as_json
@command
def recovery(repetitions: int, as_json: bool) -> None:
    """Seconds from SIGKILL of a rank to the next completed step, beside torchrun started again."""
    from orchestrator import bench, views
    from orchestrator.desk import Desk

    rows = bench.recovery(Desk.open(), repetitions)
    emit(rows, lambda: views.bench_table(rows), wants_json=as_json)


@bench.command()
@repetitions
@click.option("--steps", type=click.IntRange(min=1), default=60, show_default=True, help="Of each island.")
@as_json
@command
def overhead(repetitions: int, steps: int, as_json: bool) -> None:
    """Tokens/s of the demo beside the same ranks started by hand with torchrun."""
    from orchestrator import bench, views
    from orchestrator.desk import Desk

    rows = bench.overhead(Desk.open(), repetitions, steps)
    emit(rows, lambda: views.bench_table(rows), wants_json=as_json)


@bench.command()
@repetitions
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--size", default="512MiB", show_default=True, help="Of each rank's state.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="Where to write: the disk that is measured (default: here).",
)
@as_json
@command
def checkpoint(repetitions: int, ranks: int, size: str, directory: Path, as_json: bool) -> None:
    """Stall, durable writes, loading and resharding, beside memcpy, dd, torch's DCP and safetensors."""
    from orchestrator import checkpoint_bench
    from orchestrator.units import parse_bytes

    rows = []
    for row in checkpoint_bench.repetitions(directory, ranks, parse_bytes(size), repetitions):
        rows.append(row)
        click.echo(f"repetition {row['repetition']} of {repetitions}", err=True)
    facts = checkpoint_bench.report(rows)
    emit(facts, lambda: checkpoint_bench.table(facts), wants_json=as_json)
