"""The catalogue's machines and the operator's sites as rows (for --json) and as tables (for people)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clusters.facts import Fact, Source
from clusters.site import catalogue_beside, load_sites
from orchestrator.suggest import unknown

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from clusters.machine import Machine
    from clusters.site import Site

# What a plan asks a site for. Not everything is known of every machine; the operator's file may tell it.
_PLANNED_WITH = (
    "unit", "units_per_rank_hour", "max_ranks", "max_time_limit_seconds", "rank_memory_bytes", "rank_flops",
    "efficiency",
)  # fmt: skip
_MACHINE_COLUMNS = (
    "machine",
    "title",
    "operator",
    "device",
    "per_node",
    "nodes",
    "units",
    "facts",
    "conflicts",
)
_SITE_COLUMNS = ("site", "machine", "partition", "qos", "unit", "units_per_rank_hour", "max_ranks", "account")


def overview(sites_toml: Path) -> dict[str, list[dict[str, Any]]]:
    """`sites`: the operator's, none where the file is not there yet; `machines`: all of the catalogue."""
    known = load_sites(sites_toml) if sites_toml.exists() else {}
    catalogue = catalogue_beside(sites_toml)
    machines = [_machine(catalogue.load(name)) for name in catalogue.names()]
    return {"sites": [_site(site) for site in known.values()], "machines": machines}


def _site(site: Site) -> dict[str, Any]:
    told: dict[str, Any] = {}
    lacks: list[str] = []
    for name in _PLANNED_WITH:
        try:
            told[name] = getattr(site, name)
        except ValueError as error:
            told[name] = None
            lacks.append(str(error))
    return {
        "site": site.name,
        "machine": site.machine.name,
        "description": site.description,
        "account": site.account,
        "host": site.own.host,
        "scratch": str(site.scratch),
        "partition": site.own.partition,
        "qos": site.own.qos,
        **told,
        "lacks": list(dict.fromkeys(lacks)),
    }


def _machine(machine: Machine) -> dict[str, Any]:
    facts = [fact for _, fact in machine.facts()]
    device, node = machine.device, machine.node
    return {
        "machine": machine.name,
        "title": machine.title,
        "operator": machine.operator,
        "state": _plain(machine.state),
        "device": _plain(device.name),
        "per_node": _plain(device.per_node),
        "nodes": _plain(node.count),
        "units": sorted({charge.unit.value for charge in machine.charge.values()}),
        "facts": len(facts),
        "conflicts": sum(bool(fact.conflicts) for fact in facts),
        "read": max((str(fact.source.read) for fact in facts), default=None),
    }


def machine_facts(name: str, sites_toml: Path) -> dict[str, Any]:
    """Every fact of a machine, or of the machine of one of the operator's sites. Raises ValueError."""
    catalogue = catalogue_beside(sites_toml)
    names = catalogue.names()
    if name not in names:
        known = load_sites(sites_toml) if sites_toml.exists() else {}
        if name not in known:
            raise ValueError(unknown("machine or site", name, {*names, *known}))
        name = known[name].machine.name
    machine = catalogue.load(name)
    return {
        "machine": machine.name,
        "title": machine.title,
        "operator": machine.operator,
        "file": machine.where,
        "facts": [_fact(path, fact) for path, fact in machine.facts()],
        "sources": [_source(source) for source in machine.sources.values()],
    }


def _fact(path: str, fact: Fact[Any]) -> dict[str, Any]:
    return {
        "fact": path,
        "value": fact.plain,
        "status": fact.status,
        "source": fact.source.key,
        "date": fact.source.date,
        "read": str(fact.source.read),
        "note": fact.note,
        "conflicts": list(fact.conflicts),
    }


def _source(source: Source) -> dict[str, Any]:
    told = {"source": source.key, "kind": source.kind, "date": source.date, "read": str(source.read)}
    return {**told, "at": source.at}


def _plain(fact: Fact[Any] | None) -> Any:
    return fact.plain if fact else None


# ---- tables


def overview_tables(rows: dict[str, list[dict[str, Any]]], sites_toml: Path) -> Group:
    from rich.console import Group
    from rich.text import Text

    machines = _table("machines of the catalogue", _MACHINE_COLUMNS, rows["machines"])
    machines.caption = "eurotrain sites show MACHINE: every fact with its source, date and conflicts"
    if not rows["sites"]:
        text = f"{sites_toml} names no site of yours yet: [lumi], account, scratch and so on\n"
        return Group(Text(text), machines)
    lacks = (line for row in rows["sites"] for line in row["lacks"])
    return Group(_table("your sites", _SITE_COLUMNS, rows["sites"]), *map(Text, lacks), machines)


def facts_tables(shown: dict[str, Any]) -> Group:
    from rich.console import Group

    facts = _table(
        f"{shown['title']}: {shown['operator']}", ("fact", "value", "status", "source", "date"), []
    )
    for row in shown["facts"]:
        facts.add_row(
            _text(row["fact"]), _with_remarks(row), row["status"], row["source"], row["date"] or "undated"
        )
    facts.caption = shown["file"]
    sources = _table("sources", ("source", "kind", "date", "read", "at"), shown["sources"])
    return Group(facts, sources)


def _with_remarks(row: dict[str, Any]) -> Text:
    text = _text(row["value"])
    if row["note"]:
        text.append(f"\n({row['note']})", style="dim")
    for other in row["conflicts"]:
        text.append(f"\nconflict: {other}", style="yellow")
    return text


def _table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", caption_justify="left")
    for name in columns:
        drawn.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        cells: list[RenderableType] = [_text(row[name]) for name in columns]
        drawn.add_row(*cells)
    return drawn


def _text(value: Any) -> Text:
    """What a cell shows, word for word: brackets in it are no markup."""
    from rich.text import Text

    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, list):
        return Text(", ".join(map(str, value)))
    return Text(f"{value:.10g}" if isinstance(value, float) else "" if value is None else str(value).strip())
