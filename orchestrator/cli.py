"""The command line. Every command imports what it needs when it runs: `--help` answers at once."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

DONE, FAILED, BAD_INPUT = 0, 1, 2


def _fail(code: int, message: object) -> NoReturn:
    click.echo(f"eurotrain: {message}", err=True)
    sys.exit(code)


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Bad input ends with one clear line and code 2, a machine that fails with 1, an interrupt with 130."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            sys.exit(function(*args, **kwargs) or DONE)
        except ValueError as error:
            _fail(BAD_INPUT, error)
        except OSError as error:  # orchestrator.database.StoreError among them
            _fail(FAILED, error)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapped


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")
yes = click.option("--yes", is_flag=True, help="Do not ask before units are spent.")


def _emit(facts: Any, drawn: Callable[[], Any], *, wants_json: bool) -> None:
    """Print facts as JSON or as what `drawn` makes of them."""
    if wants_json:
        click.echo(json.dumps(facts, indent=1))
        return
    from rich.console import Console

    # Off a terminal (a log file, a pipe) a table keeps its full width instead of losing columns at 80.
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(drawn())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="eurotrain", prog_name="eurotrain")
def main() -> None:
    """Trains one language model across several supercomputers, and accounts for every unit.

    Files lie under $EUROTRAIN_HOME (default ~/.eurotrain).
    """


@main.command()
@as_json
@click.option("--quick", is_flag=True, help="Leave out what must start torch.")
@command
def doctor(as_json: bool, quick: bool) -> int:
    """Check versions, device, optional parts, limits and disk of this machine."""
    from dataclasses import asdict

    from orchestrator import doctor as examine

    found = examine.checks(quick=quick)
    _emit([asdict(check) for check in found], lambda: examine.render(found), wants_json=as_json)
    return FAILED if any(check.status == "error" for check in found) else DONE


@main.group(invoke_without_command=True)
@as_json
@click.pass_context
def sites(context: click.Context, as_json: bool) -> None:
    """Show the operator's sites, from sites.toml, and the machines of the catalogue."""
    if context.invoked_subcommand is None:
        _list_sites(as_json)


@command
def _list_sites(as_json: bool) -> None:
    from orchestrator import catalogue_view as view
    from orchestrator.home import Home

    path = Home.from_environment().sites
    rows = view.overview(path)
    _emit(rows, lambda: view.overview_tables(rows, path), wants_json=as_json)


@sites.command()
@click.argument("name")
@as_json
@command
def show(name: str, as_json: bool) -> None:
    """Show every fact known of a machine (or of a site's machine): source, date, status, conflicts."""
    from orchestrator import catalogue_view as view
    from orchestrator.home import Home

    facts = view.machine_facts(name, Home.from_environment().sites)
    _emit(facts, lambda: view.facts_tables(facts), wants_json=as_json)


@main.command()
@click.argument("run_toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@as_json
@command
def plan(run_toml: Path, as_json: bool) -> None:
    """Show ranks, memory, steps and expected units of a run; nothing is started."""
    from orchestrator import views
    from orchestrator.desk import Desk

    facts = Desk.open().plan(run_toml).to_json()
    _emit(facts, lambda: views.plan_table(facts), wants_json=as_json)
    if not as_json:
        click.echo("\n".join(views.plan_reasons(facts)))


@main.command()
@click.argument("run_toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@yes
@command
def launch(run_toml: Path, yes: bool) -> int:
    """Start a run and coordinate it until its end (Ctrl-C stops it with a checkpoint)."""
    from orchestrator import console
    from orchestrator.desk import Desk

    desk = Desk.open()
    planned = desk.plan(run_toml)
    console.show_plan(planned)
    if not yes:
        click.confirm("Reserve these units and start?", abort=True)
    run = desk.create(run_toml, planned)
    return console.coordinate(desk, run)


@main.command()
@click.argument("run", required=False)
@command
def resume(run: str | None) -> int:
    """Coordinate a run again: after a crash of the controller, a stop, or on another machine."""
    from orchestrator import console
    from orchestrator.desk import Desk

    desk = Desk.open()
    return console.resume(desk, desk.run(run))


@main.command()
@click.argument("run", required=False)
@command
def stop(run: str | None) -> int:
    """Ask every island of a run to checkpoint and exit, and wait until it has."""
    from orchestrator import console
    from orchestrator.desk import Desk

    desk = Desk.open()
    return console.stop(desk, desk.run(run))


@main.command()
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
    _emit(facts, lambda: view.table(facts), wants_json=as_json)


@main.command()
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


@main.command()
@as_json
@command
def budget(as_json: bool) -> None:
    """Show what is granted, used, committed and available in every allocation."""
    from orchestrator import views
    from orchestrator.desk import Desk

    rows = views.budget(Desk.open())
    _emit(rows, lambda: views.budget_table(rows), wants_json=as_json)


@main.command()
@click.argument("allocation")
@click.argument("amount")
@click.option("--unit", required=True, help='Native unit, such as "GPU-hour".')
@click.option("--reference", required=True, help="What names this grant; the same one is booked once.")
@command
def grant(allocation: str, amount: str, unit: str, reference: str) -> None:
    """Book a grant of AMOUNT units in ALLOCATION."""
    from orchestrator.desk import Desk
    from orchestrator.units import micro_units

    booked = Desk.open().ledger.grant(allocation, micro_units(amount), unit, reference)
    click.echo(f"{allocation}: {'booked' if booked else 'this grant was booked before; nothing changed'}")


@main.command()
@click.option("--kill-a-rank", is_flag=True, help="Kill one rank with SIGKILL midway, to see it recover.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each island, rounded up to whole rounds.")
@command
def demo(kill_a_rank: bool, steps: int | None) -> int:
    """Train one small model across two local sites, joined by DiLoCo rounds."""
    from orchestrator import demo as show

    return show.run(kill_a_rank=kill_a_rank, steps=steps)


@main.group()
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
    _emit(rows, lambda: views.bench_table(rows), wants_json=as_json)


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
    _emit(rows, lambda: views.bench_table(rows), wants_json=as_json)


if __name__ == "__main__":
    main()
