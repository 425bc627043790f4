"""pydantic's findings in the words of the user's file: one line each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.suggest import nearest, unknown

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": 'text in quotes, such as "x"',
    "bool_type": "true or false",
    "tuple_type": "a list, such as [1, 2]",
    "dataclass_type": "a table",
    "string_pattern_mismatch": "small letters, digits and inner hyphens, at most 40",
}
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def explain(error: ValidationError, table: dict[str, Any], spec: type[BaseModel]) -> list[str]:
    """One line per mistake, each naming its key as the user wrote it."""
    details = error.errors(include_url=False)
    misspelt = [d["loc"] for d in details if d["type"] in _UNKNOWN_KEY]
    meant = {(*at[:-1], nearest(str(at[-1]), _keys(at[:-1], spec))) for at in misspelt}
    told = [d for d in details if not (d["type"] == "missing" and d["loc"] in meant)]
    return [line for detail in told for line in _lines(detail, table, spec)]


def _lines(detail: ErrorDetails, table: dict[str, Any], spec: type[BaseModel]) -> Iterator[str]:
    key, kind = _key(detail["loc"], table), detail["type"]
    if kind in _UNKNOWN_KEY:
        where, _, word = key.rpartition(".")
        yield f"{where + ': ' if where else ''}" + unknown("key", word, _keys(detail["loc"][:-1], spec))
    elif kind == "missing":
        yield f"{key} is missing"
    elif kind == "value_error":
        for line in str(detail["ctx"]["error"]).splitlines():
            yield f"{key}: {line}" if key else line
    elif kind == "literal_error":
        yield f"{key} is {json.dumps(detail['input'])[:60]}; it must be {detail['ctx']['expected']}"
    elif kind in _WANTED:
        wanted = "[[islands]] tables, in double brackets" if key == "islands" else _WANTED[kind]
        yield f"{key} is {json.dumps(detail['input'])[:60]}; it must be {wanted}"
    else:
        yield f"{key}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _key(location: tuple[int | str, ...], table: dict[str, Any]) -> str:
    """ "training.tokens", "islands.local-a.tp": a list's tables by their site, where they name one."""
    parts: list[str] = []
    node: Any = table
    for step in location:
        node = node[step] if isinstance(step, int) or (isinstance(node, dict) and step in node) else None
        site = node.get("site") if isinstance(step, int) and isinstance(node, dict) else None
        named = site if isinstance(site, str) else f"#{step + 1}" if isinstance(step, int) else step
        parts.append(named)
    return ".".join(parts)


def _keys(location: tuple[int | str, ...], spec: type[BaseModel]) -> list[str]:
    """Keys that the table at `location` may have."""
    if not location:
        return list(spec.model_fields)
    name = str(location[0])
    annotation = spec.model_fields[name].annotation
    found = next(t for t in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(t))
    known = getattr(found, "__pydantic_fields__", None)
    if known is None:
        keys = [f.name for f in dataclasses.fields(found)]
    else:
        keys = [info.alias or key for key, info in known.items() if info.init is not False]
    return [*keys, "preset"] if name == "model" else keys
