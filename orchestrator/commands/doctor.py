"""eurotrain doctor."""

from __future__ import annotations

import click

from orchestrator.commands.frame import DONE, FAILED, as_json, command, emit


@click.command()
@as_json
@click.option("--quick", is_flag=True, help="Leave out what must start torch.")
@command
def doctor(as_json: bool, quick: bool) -> int:
    """Check versions, device, optional parts, limits and disk of this machine."""
    from dataclasses import asdict

    from orchestrator import doctor as examine

    found = examine.checks(quick=quick)
    emit([asdict(check) for check in found], lambda: examine.render(found), wants_json=as_json)
    return FAILED if any(check.status == "error" for check in found) else DONE
