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


@bench.command()
@click.argument("site")
@repetitions
@as_json
@command
def poll(site: str, repetitions: int, as_json: bool) -> None:
    """Seconds of a poll of SITE, beside `ssh SITE squeue --me` over the same session."""
    from clusters.connection import Unreachable
    from orchestrator import bench, bench_poll, views
    from orchestrator.desk import Desk
    from orchestrator.suggest import unknown

    desk = Desk.open()
    sites = desk.sites()
    if site not in sites:
        raise ValueError(unknown("site", site, sites))
    try:
        pairs = bench_poll.poll(sites[site], desk.home.root, repetitions)
    except Unreachable as error:
        raise OSError(str(error)) from None
    rows = [bench.report("a poll, beside squeue alone", "s", pairs, "ssh squeue --me")]
    emit(rows, lambda: views.bench_table(rows), wants_json=as_json)


@bench.command()
@click.option("--sites", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1000, show_default=True, help="Of each site.")
@click.option("--talking", type=click.IntRange(min=0), default=100, show_default=True,
              help="Jobs of each site that tell a step between two polls.")  # fmt: skip
@click.option("--interval", type=click.FloatRange(min=1), default=30, show_default=True,
              help="Seconds between two polls of a site.")  # fmt: skip
@click.option("--cycles", type=click.IntRange(min=1), default=3, show_default=True)
@as_json
@command
def watch(sites: int, jobs: int, talking: int, interval: float, cycles: int, as_json: bool) -> None:
    """CPU and memory of a controller that watches simulated sites through the real agent."""
    from orchestrator import bench_watch, views

    facts = bench_watch.watch(sites, jobs, cycles, interval, talking)
    emit(facts, lambda: views.watch_table(facts), wants_json=as_json)


@bench.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@repetitions
@as_json
@command
def replicate(checkpoint: Path, repetitions: int, as_json: bool) -> None:
    """How far a checkpoint's bytes shrink without loss for a slow link, beside ZipNN."""
    from orchestrator import bench_replicate, views

    rows = bench_replicate.compression(checkpoint, repetitions)
    emit(rows, lambda: views.bench_table(rows), wants_json=as_json)
