"""The tables of the controller's database, and the triggers that make its logs append-only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Double,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

FORMAT = 1  # of this database; raised with every change to the tables


class Facts(TypeDecorator[dict[str, Any]]):
    """A JSON object kept as text: a loss may be NaN, which neither database's own JSON type admits."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, Any] | None, dialect: Dialect) -> str:  # noqa: ARG002
        return json.dumps(dict(value or {}))

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any]:  # noqa: ARG002
        return dict(json.loads(value or "{}"))


metadata = MetaData()
_Identity = BigInteger().with_variant(Integer, "sqlite")  # only an INTEGER key is SQLite's own row id

format_version = Table("eurotrain_format", metadata, Column("version", Integer, primary_key=True))

# One line of one stream for ever. The controller's own events have no site and no segment.
events = Table(
    "events",
    metadata,
    Column("id", _Identity, primary_key=True),
    Column("run", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("segment", Text, nullable=False),
    Column("stream", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("time", Double, nullable=False),  # by the clock of whoever wrote it
    Column("received", Double, nullable=False),  # by the database's clock
    Column("kind", Text, nullable=False),
    Column("facts", Facts, nullable=False),
    UniqueConstraint("run", "site", "segment", "stream", "offset"),
    Index("events_by_run", "run", "id"),
    Index("events_by_kind", "run", "kind", "id"),
)

# Up to which byte each stream is in `events`; moved in the transaction that adds the lines.
cursors = Table(
    "cursors",
    metadata,
    Column("site", Text, primary_key=True),
    Column("segment", Text, primary_key=True),
    Column("stream", Text, primary_key=True),
    Column("offset", BigInteger, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("run", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("expires", Double, nullable=False),  # by the database's clock
)

# The ledger. Amounts are millionths of the unit: see orchestrator/units.py.
entries = Table(
    "entries",
    metadata,
    Column("id", _Identity, primary_key=True),
    Column("allocation", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("unit", Text, nullable=False),
    Column("reference", Text, nullable=False),
    Column("time", Double, nullable=False),  # by the database's clock
    Column("evidence", Facts, nullable=False),
    UniqueConstraint("allocation", "kind", "reference"),
)

APPEND_ONLY = (events, entries)


def guards(dialect: str) -> list[str]:
    """Statements that make the database itself refuse to change or delete a line of a log."""
    make = {"sqlite": _sqlite_guards, "postgresql": _postgresql_guards}[dialect]
    return [statement for table in APPEND_ONLY for statement in make(table)]


def _sqlite_guards(table: Table) -> list[str]:
    unique = next(c for c in table.constraints if isinstance(c, UniqueConstraint))
    same = " AND ".join(f'"{c.name}" = NEW."{c.name}"' for c in unique.columns)
    refuse = f"BEGIN SELECT RAISE(ABORT, '{table.name} is append-only'); END"
    here = f"SELECT 1 FROM {table.name} WHERE id = NEW.id OR ({same})"  # noqa: S608
    return [
        f"CREATE TRIGGER {table.name}_keep_update BEFORE UPDATE ON {table.name} {refuse}",
        f"CREATE TRIGGER {table.name}_keep_delete BEFORE DELETE ON {table.name} {refuse}",
        # INSERT OR REPLACE deletes without firing a delete trigger, unless the connection asked for it.
        f"CREATE TRIGGER {table.name}_keep_replace BEFORE INSERT ON {table.name} "
        f"WHEN EXISTS ({here}) {refuse}",
    ]


def _postgresql_guards(table: Table) -> list[str]:
    return [
        f"CREATE FUNCTION {table.name}_keep() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table.name} is append-only'; END $$",
        f"CREATE TRIGGER {table.name}_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON {table.name} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table.name}_keep()",
    ]
