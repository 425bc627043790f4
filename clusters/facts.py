"""Facts with their sources, and the strict reader of the catalogue's tables.

A fact is written `key = value` below a table's `source = "id"`, which holds for the tables inside it too,
or in full: `key = {value = 512, source = "id", status = "derived", note = "...", conflict = ["..."]}`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any, Callable, Generic, TypeVar  # noqa: UP035 - Python 3.9 syntax, as in the whole room

T = TypeVar("T")
G = TypeVar("G")

# seen: read in the source; derived: computed from what was read, as the note shows; assumed: a stand-in for
# this machine only. What is known from memory alone is not written down.
STATUSES = ("seen", "derived", "assumed")
KINDS = ("official", "third party")
_FACT_KEYS = ("value", "source", "status", "note", "conflict")
_SLURM_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True)
class Source:
    """Where facts were read. `date` is the source's own date as far as it tells, `read` when we read it."""

    key: str
    at: str
    kind: str
    read: date
    date: str | None = None


@dataclass(frozen=True)
class Fact(Generic[T]):
    """One thing known of a machine. `conflicts` are other readings, kept in sight."""

    value: T
    source: Source
    status: str = "seen"
    note: str = ""
    conflicts: tuple[str, ...] = ()

    @property
    def plain(self) -> Any:
        """The value as JSON has it: a time as Slurm writes it, a number as a number."""
        if isinstance(self.value, timedelta):
            return format_slurm_time(self.value)
        if isinstance(self.value, Decimal):
            return float(self.value)
        return list(self.value) if isinstance(self.value, tuple) else self.value


def parse_slurm_time(text: str) -> timedelta:
    """ "2-00:00:00" or "00:30:00". Raises ValueError."""
    match = _SLURM_TIME.fullmatch(text)
    if not match:
        raise ValueError(f'{text!r} is not a time as Slurm writes it, such as "2-00:00:00"')
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def format_slurm_time(span: timedelta) -> str:
    hours, rest = divmod(span.seconds, 3600)
    clock = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{span.days}-{clock}" if span.days else clock


def check_known(where: str, word: str, allowed: Iterable[str]) -> None:
    """Raises ValueError, naming the nearest word and all of them, unless `word` is allowed."""
    names = list(allowed)
    if word not in names:
        near = difflib.get_close_matches(word, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{where}: unknown {word!r}; {hint}known: {', '.join(names) or 'none'}")


def facts_of(group: Any, path: str = "") -> Iterator[tuple[str, Fact[Any]]]:
    """Every fact of a group with its dotted name, in the order of the fields."""
    if isinstance(group, Fact):
        yield path, group
    elif isinstance(group, tuple):
        for item in group:
            yield from facts_of(item, path)
    elif isinstance(group, Mapping):
        for key, item in group.items():
            yield from facts_of(item, f"{path}.{key}" if path else key)
    elif dataclasses.is_dataclass(group) and not isinstance(group, Source):
        for field in dataclasses.fields(group):
            yield from facts_of(getattr(group, field.name), f"{path}.{field.name}" if path else field.name)


def merged(base: G, own: G | None) -> G:
    """A group with those facts replaced that its own table tells."""
    if own is None:
        return base
    names = (field.name for field in dataclasses.fields(base))  # type: ignore[arg-type]
    told = {name: getattr(own, name) for name in names if getattr(own, name)}
    return dataclasses.replace(base, **told)  # type: ignore[type-var]


@dataclass(frozen=True)
class Reader:
    """Reads the tables of one file into dataclasses of facts. Every method raises ValueError, one line."""

    where: str
    sources: Mapping[str, Source]

    def group(self, kind: type[G], table: Any, path: str, source: str | None = None) -> G:
        """A dataclass whose fields are facts, notes, mappings of them, or further groups."""
        return kind(**self.fields(kind, table, path, source))

    def fields(
        self, kind: type, table: Any, path: str, source: str | None = None, only: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """What a table tells of a dataclass's fields (of `only` these)."""
        source = self._inherited(table, path, source)
        where = f"{self.where}: [{path}]" if path else self.where
        hints = typing.get_type_hints(kind)
        known = [f for f in dataclasses.fields(kind) if only is None or f.name in only]
        for key in table:
            check_known(where, key, [*(f.name for f in known), "source"])
        for f in known:
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in table:
                raise ValueError(f"{where} lacks {f.name}")
        inside = ((key, raw, f"{path}.{key}" if path else key) for key, raw in table.items())
        return {key: self._field(hints[key], raw, at, source) for key, raw, at in inside if key != "source"}

    def fact(self, kind: Any, raw: Any, path: str, source: str | None) -> Fact[Any]:
        told = raw if isinstance(raw, dict) else {"value": raw}
        where = f"{self.where}: {path}"
        for key in told:
            check_known(where, key, _FACT_KEYS)
        if "value" not in told:
            raise ValueError(f"{where} lacks a value")
        status, note = told.get("status", "seen"), told.get("note", "")
        check_known(f"{where} status", status, STATUSES)
        if status == "derived" and not note:
            raise ValueError(f"{where} is derived: its note must say from what")
        return Fact(
            value=parse_value(where, kind, told["value"]),
            source=self._source(where, told.get("source", source)),
            status=status,
            note=parse_value(f"{where} note", str, note) if note else "",
            conflicts=parse_value(f"{where} conflict", tuple[str, ...], told.get("conflict", [])),
        )

    def _field(self, hint: Any, raw: Any, path: str, source: str | None) -> Any:
        hint = without_none(hint)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Fact:
            return self.fact(arguments[0], raw, path, source)
        if origin is tuple:
            if not isinstance(raw, list):
                raise ValueError(f"{self.where}: {path} must be a list")
            return tuple(self._field(arguments[0], item, path, source) for item in raw)
        if origin is None:
            return self.group(hint, raw, path, source)
        source = self._inherited(raw, path, source)
        items = ((key, item) for key, item in raw.items() if key != "source")
        return {key: self._field(arguments[1], item, f"{path}.{key}", source) for key, item in items}

    def _inherited(self, table: Any, path: str, source: str | None) -> str | None:
        if not isinstance(table, dict):
            raise ValueError(f"{self.where}: {path} must be a table such as [{path}]")
        return table.get("source", source)

    def _source(self, where: str, key: Any) -> Source:
        if key is None:
            raise ValueError(f"{where} has no source, and no table around it names one")
        check_known(f"{where} source", key, self.sources)
        return self.sources[key]


def read_sources(where: str, table: Any, read: Any) -> dict[str, Source]:
    """`[sources]`: `id = {at = "address", date = "2024-10", kind = "official"}`. Raises ValueError."""
    sources = {}
    for key, told in table.items() if isinstance(table, dict) else ():
        at = f"{where}: [sources] {key}"
        if not isinstance(told, dict):
            raise ValueError(f'{at} must be a table such as {{at = "https://..."}}')
        for name in told:
            check_known(at, name, ("at", "date", "kind", "read"))
        if not told.get("at"):
            raise ValueError(f"{at} lacks at, the address where its facts were read")
        kind, when = told.get("kind", "official"), told.get("read", read)
        check_known(f"{at} kind", kind, KINDS)
        if not isinstance(when, date):
            raise ValueError(f"{at}: read must be a date such as 2026-11-21, here or at the head of the file")
        sources[key] = Source(key, told["at"], kind, when, told.get("date"))
    return sources


def without_none(hint: Any) -> Any:
    """The type X of a hint `X | None`; any other hint as it is."""
    rest = [a for a in typing.get_args(hint) if a is not type(None)]
    return rest[0] if type(None) in typing.get_args(hint) else hint


def parse_value(where: str, kind: Any, raw: Any) -> Any:
    """A TOML value as one of the kinds of _PARSERS. Raises ValueError, saying what it must be."""
    parse, wanted = _PARSERS[kind]
    try:
        return parse(raw)
    except (TypeError, ValueError):
        shown = str(raw) if isinstance(raw, Decimal) else repr(raw)
        raise ValueError(f"{where} is {shown}; it must be {wanted}") from None


def _whole(raw: Any) -> int:
    if type(raw) is not int or raw < 0:
        raise ValueError
    return raw


def _number(raw: Any) -> Decimal:
    if type(raw) not in (int, float, Decimal) or not Decimal(raw).is_finite() or raw < 0:
        raise ValueError
    return Decimal(str(raw)) if isinstance(raw, float) else Decimal(raw)


def _text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError
    return raw


def _flag(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise TypeError
    return raw


def _list_of(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parsed(raw: Any) -> Any:
        if not isinstance(raw, list):
            raise TypeError
        return tuple(parse(item) for item in raw)

    return parsed


_PARSERS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_whole, "a whole number, 0 or more"),
    Decimal: (_number, "a number, 0 or more"),
    str: (_text, "a text"),
    bool: (_flag, "true or false"),
    timedelta: (lambda raw: parse_slurm_time(_text(raw)), 'a time as Slurm writes it, such as "2-00:00:00"'),
    tuple[str, ...]: (_list_of(_text), "a list of texts"),
    tuple[int, ...]: (_list_of(_whole), "a list of whole numbers"),
}
