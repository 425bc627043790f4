"""eurotrain budget | grant."""

from __future__ import annotations

import click

from orchestrator.commands.frame import as_json, command, emit


@click.command()
@as_json
@command
def budget(as_json: bool) -> None:
    """Show what is granted, used, committed and available in every allocation."""
    from orchestrator import views
    from orchestrator.desk import Desk

    rows = views.budget(Desk.open())
    emit(rows, lambda: views.budget_table(rows), wants_json=as_json)


@click.command()
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
