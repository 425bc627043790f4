"""The operator's part of a site: one table of sites.toml, read strictly."""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from clusters.facts import check_known, parse_value, without_none
from clusters.windows import parse_window


@dataclass(frozen=True)
class Own:
    """What only the operator knows. From `unit` on it stands in for facts that the catalogue lacks."""

    scratch: Path
    catalogue: str
    account: str = ""
    user: str = ""
    host: str = ""  # alias in the operator's ssh configuration; none: this machine
    data_mover: str = ""  # another alias, for files
    python: str | None = None  # that runs segments; none: a bundle of wheels is made
    base_python: str = "python3"  # what that is made with
    pip: tuple[str, ...] = ()  # more words for pip, which collects the wheels here: the builds of torch, say
    modules: tuple[str, ...] = ()
    container: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)  # of jobs: goes before the catalogue's
    partition: str = ""
    qos: str = ""
    exclude: tuple[str, ...] = ()  # nodes that no job of ours is to run on
    maintenance: tuple[str, ...] = ()  # windows without jobs that the site's scheduler does not know of
    unit: str = ""
    units_per_rank_hour: Fraction | None = None
    ranks_per_node: int | None = None
    rank_memory_gib: Fraction | None = None
    rank_tflops: Fraction | None = None
    efficiency: Fraction | None = None
    max_ranks: int | None = None
    max_time: timedelta | None = None
    poll: timedelta | None = None  # between two exchanges with the site
    ahead: int | None = None  # segments to keep queued behind the running one


_WRITTEN_AS: Mapping[Any, Any] = {Path: str, Fraction: Decimal}


def load_own(path: Path) -> dict[str, Own]:
    """Every site's table by its name. Raises ValueError: what is wrong, where, what is allowed."""
    try:
        tables = tomllib.loads(path.read_text(), parse_float=Decimal)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it names your sites, their accounts and paths") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    return {name: _own(path, name, table) for name, table in tables.items()}


def _own(path: Path, name: str, table: Any) -> Own:
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name} must be a table such as [{name}]")
    where = f"{path}: [{name}]"
    hints = typing.get_type_hints(Own)
    for key in table:
        check_known(where, key, hints)
    if "scratch" not in table:
        raise ValueError(f"{where} lacks scratch, the directory there that eurotrain may fill")
    told = {key: _value(f"{where} {key}", hints[key], raw) for key, raw in table.items()}
    for text in told.get("maintenance", ()):
        _check_window(f"{where} maintenance", text)
    return Own(**{"catalogue": name, **told})


def _check_window(where: str, text: str) -> None:
    try:
        parse_window(text)
    except ValueError as error:
        example = '"2026-12-01T08:00+01:00/2026-12-01T18:00+01:00"'
        raise ValueError(f"{where}: {error}; write beginning and end such as {example}") from None


def _value(where: str, hint: Any, raw: Any) -> Any:
    kind = without_none(hint)
    if kind == Mapping[str, str]:
        return _variables(where, raw)
    value = parse_value(where, _WRITTEN_AS.get(kind, kind), raw)
    if isinstance(value, (Decimal, int)) and not value:
        raise ValueError(f"{where} is 0; it must be more")
    if kind is Path:
        return Path(value).expanduser()
    return Fraction(value) if kind is Fraction else value


def _variables(where: str, raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise ValueError(f'{where} is {raw!r}; it must be a table such as {{NCCL_DEBUG = "INFO"}}')
    for name, value in raw.items():
        if not (
            re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and isinstance(value, str) and "\n" not in value
        ):
            raise ValueError(f"{where}.{name} is {value!r}; it must be a variable with a text of one line")
    return dict(raw)
