"""eurotrain sites ..."""

from __future__ import annotations

import click

from orchestrator.commands.frame import as_json, command, emit


@click.group(invoke_without_command=True)
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
    emit(rows, lambda: view.overview_tables(rows, path), wants_json=as_json)


@sites.command()
@click.argument("name")
@as_json
@command
def show(name: str, as_json: bool) -> None:
    """Show every fact known of a machine (or of a site's machine): source, date, status, conflicts."""
    from orchestrator import catalogue_view as view
    from orchestrator.home import Home

    facts = view.machine_facts(name, Home.from_environment().sites)
    emit(facts, lambda: view.facts_tables(facts), wants_json=as_json)
