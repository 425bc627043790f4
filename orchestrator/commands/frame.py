"""What all commands share: how they end, and how facts are printed."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
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


def emit(facts: Any, drawn: Callable[[], Any], *, wants_json: bool) -> None:
    """Print facts as JSON or as what `drawn` makes of them."""
    if wants_json:
        click.echo(json.dumps(facts, indent=1))
        return
    from rich.console import Console

    # Off a terminal (a log file, a pipe) a table keeps its full width instead of losing columns at 80.
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(drawn())
