"""Law 5: a segment is submitted where all that it needs is staged and verified, and nowhere else."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from clusters import probe
from clusters.connection import Connection, Unreachable
from clusters.filesystems import holding, purge_days
from clusters.site import Site
from orchestrator.plan import Plan
from orchestrator.stage import Options, Stager
from orchestrator.stock import Content, Record, Stock, run_paths, staged_start, start_paths

Sites = Mapping[str, tuple[Site, Connection]]

_DAY = 86400
_NEAR = 0.75  # of the age at which files are deleted: a month before 120 days, a week before 28


def needs(plan: Mapping[str, Any], site: str, run_toml: Path) -> dict[str, Any]:
    """The agent's `submit` is told so; nothing for a run planned before anything was staged."""
    island = next(i for i in plan["islands"] if i["site"] == site)
    found = {"files": plan.get("files") or [], "bundle": island.get("bundle", "")}
    return {"needs": {**found, "advice": advice(site, run_toml)}} if any(found.values()) else {}


def advice(site: str, run_toml: Path) -> str:
    return f"eurotrain stage {site} --run {shlex.quote(str(run_toml))}"


def with_stock(plan: Plan, tokenizer: str | None, sites: Sites, stock: Stock, run_toml: Path) -> Plan:
    """The plan with what was staged for it. Raises ValueError, a line for each site without.

    On this machine segments run from this very interpreter; elsewhere from a bundle.

    All islands train on the same text: sites at which one path holds different contents are no match.
    """
    records = {name: stock.load(name) for name in sites}
    if lines := unstaged(plan, tokenizer, sites, stock, run_toml):
        raise ValueError("\n".join(lines))
    first = next(iter(records.values()))
    files = tuple(_contents(plan, tokenizer, first))
    bundles = {name: records[name].bundle["id"] for name, (site, _) in sites.items() if site.own.host}
    islands = tuple(dataclasses.replace(i, bundle=bundles.get(i.site, "")) for i in plan.islands)
    return dataclasses.replace(plan, islands=islands, files=files)


def unstaged(plan: Plan, tokenizer: str | None, sites: Sites, stock: Stock, run_toml: Path) -> list[str]:
    """A line for each site where something of a run was never staged; by the records, nobody is asked."""
    found, lines = dict[str, list[Content]](), []
    for name, (site, _) in sites.items():
        record = stock.load(name)
        try:
            found[name] = _contents(plan, tokenizer, record)
            lacking = "a bundle" if site.own.host and not record.bundle else ""
        except KeyError as error:
            lacking = str(error.args[0])
        if lacking:
            lines.append(f"{name}: {lacking} has not been staged: type `{advice(name, run_toml)}`")
    return lines or _differences(found)


def _contents(plan: Plan, tokenizer: str | None, record: Record) -> list[Content]:
    """Of all that a run reads. Raises KeyError for what was never staged."""
    return record.contents([*run_paths(plan.data, tokenizer), *staged_start(plan.start, record)])


def _differences(found: Mapping[str, list[Content]]) -> list[str]:
    (first, contents), *others = found.items() or [("", [])]
    return [
        f"{mine[0]} at {site} is another than at {first}: islands of one run read the same text"
        for site, theirs in others
        for mine, other in zip(theirs, contents, strict=True)
        if mine != other
    ]


def ask(plan: Plan, sites: Sites, run_toml: Path) -> list[str]:
    """Ask every site whether it still has all; a warning for each that may not have it for long.

    Raises ValueError, a line for each site where something is missing, and OSError for one that is silent.
    """
    missing, warnings = [], []
    for name, (site, connection) in sites.items():
        operation = {"op": "staged", **needs(plan.to_json(), name, run_toml)}
        try:
            (told,) = connection.exchange([operation])
        except Unreachable as error:
            raise OSError(str(error)) from None
        if told["ok"]:
            warnings += purge_warning(site, told["oldest"], advice(name, run_toml))
        else:
            missing.append(f"{name}: {told['error']}")
    if missing:
        raise ValueError("\n".join(missing))
    return warnings


def purge_warning(site: Site, oldest: float, remedy: str) -> list[str]:
    """Where the catalogue knows that old files are deleted, and the oldest of ours comes near that age."""
    old = old_age(site)
    if old is None or oldest < old:
        return []
    name, days = _purged(site) or ("", 0)
    told = f"{site.name}: what was staged is {oldest / _DAY:.0f} days old, and {name} deletes after {days}"
    return [f"{told}: type `{remedy}`"]


def old_age(site: Site) -> float | None:
    """Seconds from which on files are near the age at which the site deletes them; None where it does not."""
    purged = _purged(site)
    return purged[1] * _DAY * _NEAR if purged else None


def _purged(site: Site) -> tuple[str, int] | None:
    """Name of scratch's file system, and the days after which files there are deleted."""
    held = holding(site.machine.filesystem, PurePosixPath(site.scratch))
    days = purge_days(held[1]) if held else None
    return (held[0], days) if held and days is not None else None


def ready(
    plan: Plan, tokenizer: str | None, sites: Sites, stock: Stock, run_toml: Path
) -> tuple[Plan, list[str]]:
    """See Desk.ready. What lies at a site on this machine needs no staging: it is read where it is."""
    for name, (site, connection) in sites.items():
        if not site.own.host:
            stager = Stager(name, connection, stock, Options(replace=True))
            start = start_paths(plan.start, Path(site.scratch))
            stager.files_there([*run_paths(plan.data, tokenizer), *start])
    staged = with_stock(plan, tokenizer, sites, stock, run_toml)
    return staged, [*ask(staged, sites, run_toml), *_other_code(sites, stock, run_toml)]


def _other_code(sites: Sites, stock: Stock, run_toml: Path) -> list[str]:
    """Segments run from what was staged, whatever has been changed here since."""
    bundles = {name: stock.load(name).bundle for name, (site, _) in sites.items() if site.own.host}
    own = probe.code_digest() if bundles else ""
    return [
        f"{name}: its bundle has other code of eurotrain than this one: type `{advice(name, run_toml)}`"
        for name, bundle in bundles.items()
        if bundle["code"] != own
    ]
