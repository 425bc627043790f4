"""eurotrain plan | launch | resume | stop | status | logs: one run, from its plan to its end."""

from __future__ import annotations

import time
from pathlib import Path

import click

from orchestrator.commands.frame import as_json, command, emit, yes


@click.command()
@click.argument("run_toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@as_json
@command
def plan(run_toml: Path, as_json: bool) -> None:
    """Show ranks, memory, steps and expected units of a run; nothing is started."""
    from orchestrator import views
    from orchestrator.desk import Desk

    desk = Desk.open()
    planned = desk.plan(run_toml)
    unstaged = desk.unstaged(run_toml, planned)
    facts = {**planned.to_json(), "unstaged": unstaged}
    emit(facts, lambda: views.plan_table(facts), wants_json=as_json)
    if not as_json:
        click.echo(
            "\n".join([*views.plan_reasons(facts), *(f"before a launch: {line}" for line in unstaged)])
        )


@click.command()
@click.argument("run_toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@yes
@command
def launch(run_toml: Path, yes: bool) -> int:
    """Start a run and coordinate it until its end (Ctrl-C stops it with a checkpoint)."""
    from orchestrator import console
    from orchestrator.desk import Desk

    desk = Desk.open()
    planned, warnings = desk.ready(run_toml, desk.plan(run_toml))
    console.show_plan(planned)
    for warning in warnings:
        click.echo(f"eurotrain: {warning}", err=True)
    if not yes:
        click.confirm("Reserve these units and start?", abort=True)
    run = desk.create(run_toml, planned)
    return console.coordinate(desk, run)


@click.command()
@click.argument("run", required=False)
@command
def resume(run: str | None) -> int:
    """Coordinate a run again: after a crash of the controller, a stop, or on another machine."""
    from orchestrator import console
    from orchestrator.desk import Desk

    desk = Desk.open()
    return console.resume(desk, desk.run(run))


@click.command()
@click.argument("run", required=False)
@command
def stop(run: str | None) -> int:
    """Ask every island of a run to checkpoint and exit, and wait until it has."""
    from orchestrator import console
    from orchestrator.desk import Desk

    desk = Desk.open()
    return console.stop(desk, desk.run(run))


@click.command()
@click.argument("run", required=False)
@as_json
@command
def status(run: str | None, as_json: bool) -> None:
    """Show the progress of a run and what each island does now."""
    from orchestrator import status as view
    from orchestrator.desk import Desk

    desk = Desk.open()
    name = desk.run(run)
    facts = view.status(desk.state(name), desk.store.holder(name))
    emit(facts, lambda: view.table(facts), wants_json=as_json)


@click.command()
@click.argument("run", required=False)
@click.option("--site", help="Only this site.")
@click.option("--rank", type=int, help="Only this rank.")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@command
def logs(run: str | None, site: str | None, rank: int | None, follow: bool) -> None:
    """Print what ranks and supervisors of a run wrote."""
    from orchestrator import logs as reader
    from orchestrator.desk import Desk

    desk = Desk.open()
    name = desk.run(run)
    ended = lambda: desk.state(name).outcome is not None  # noqa: E731
    for line in reader.lines(desk.home.run(name), site, rank, ended if follow else None):
        click.echo(line)


@click.command()
@click.argument("site")
@click.argument("node")
@click.argument("run", required=False)
@command
def trust(site: str, node: str, run: str | None) -> None:
    """Let the segments of a run use a node again that they keep away from (`eurotrain status` says why)."""
    from orchestrator import kinds
    from orchestrator.desk import Desk
    from orchestrator.exclusion import excluded
    from orchestrator.suggest import unknown

    desk = Desk.open()
    name = desk.run(run)
    islands = desk.state(name).islands
    if site not in islands:
        raise ValueError(unknown("site", site, islands))
    avoided = excluded(islands[site], time.time())
    if node not in avoided:
        known = f"its segments keep away from {', '.join(avoided) or 'none'}"
        raise ValueError(f"{name}: {node} is no node of {site} to be trusted again; {known}")
    desk.store.record(name, kinds.NODE_TRUSTED, site=site, node=node)
    click.echo(f"{name}: {site} may use {node} again")
