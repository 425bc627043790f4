"""Plans and budgets as rows (for --json) and as tables (for people)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from orchestrator.units import MICRO, format_bytes, format_count, format_duration, format_units
from parallelism.layout import Layout

if TYPE_CHECKING:
    from rich.table import Table

    from orchestrator.desk import Desk
    from orchestrator.ledger import Balance
    from orchestrator.state import IslandState

_BENCHED = ("eurotrain", "peer", "ratio")


def budget(desk: Desk) -> list[dict[str, Any]]:
    """One row per allocation, in native units; `burning` is estimated from running jobs' elapsed time."""
    states = [desk.state(run) for run in desk.store.runs()]
    islands = [(state.plan_of(i.site), i) for state in states for i in state.islands.values()]
    rows = []
    for allocation in desk.ledger.allocations():
        burning: dict[str, int] = {}
        for plan, island in islands:
            if plan["allocation"] == allocation:
                burning |= _burning(plan, island)
        rows.append(_balance(desk.ledger.balance(allocation, burning)))
    return rows


def _balance(balance: Balance) -> dict[str, Any]:
    amounts = ("granted", "settled", "burning", "committed", "available")
    return {
        "allocation": balance.allocation,
        "unit": balance.unit,
        **{name: getattr(balance, name) / MICRO for name in amounts},
        "age_seconds": round(balance.age, 1),
    }


def _burning(plan: dict[str, Any], island: IslandState) -> dict[str, int]:
    """Micro-units that this island's running segments have burnt so far, by their key."""
    now = time.time()
    return {
        s.key: round(max(0.0, now - s.job["started"]) / 3600 * plan["units_per_hour"] * MICRO)
        for s in island.segments
        if s.job["state"] == "running" and s.job.get("started") and not s.over
    }


def budget_table(rows: list[dict[str, Any]]) -> Table:
    names = ("granted", "settled", "burning", "committed", "available")
    drawn = _table("allocation", "unit", *names)
    for row in rows:
        drawn.add_row(row["allocation"], row["unit"], *(f"{row[name]:,.3f}" for name in names))
    drawn.caption = "burning: estimated from the elapsed time of running jobs"
    return drawn


def plan_table(plan: dict[str, Any]) -> Table:
    """What a run would take: shown before anything is reserved."""
    drawn = _table(
        "site", "layout", "nodes", "ranks", "steps", "memory/rank", "expected", "reserved", "allocation"
    )
    for island in plan["islands"]:
        unit = island["unit"]
        expected = format_units(island["estimated_units"], unit)
        drawn.add_row(
            island["site"],
            str(Layout.from_mapping(island["layout"])),
            str(island["nodes"]),
            str(island["ranks"]),
            str(island["steps"]),
            f"~{format_bytes(island['estimated_memory_per_rank_bytes'])}",
            f"~{format_duration(island['estimated_seconds'])}, ~{expected}",
            format_units(island["reserved"], unit),
            island["allocation"],
        )
    tokens = format_count(plan["tokens"])
    drawn.title = f"{plan['name']}: {format_count(plan['parameters'])} parameters, {tokens} tokens"
    drawn.title_justify = "left"
    return drawn


def plan_reasons(plan: dict[str, Any]) -> list[str]:
    """Why the plan says what it says, a line each."""
    of_islands = [f"{i['site']}: {reason}" for i in plan["islands"] for reason in i["reasons"]]
    return ["~ is an estimate", *plan["reasons"], *of_islands]


def bench_table(rows: list[dict[str, Any]]) -> Table:
    """Medians, with the spread behind them."""
    drawn = _table("measured", "unit", "eurotrain", "peer", "ratio")
    for row in rows:
        cells = [f"{row[k]['median']:.3g} ({row[k]['min']:.3g}-{row[k]['max']:.3g})" for k in _BENCHED]
        drawn.add_row(row["name"], row["unit"], *cells)
    drawn.caption = (
        f"medians of {rows[0]['repetitions']} (min-max); peer: {rows[0]['peer_name']}; ratios pair by pair"
    )
    return drawn


def watch_table(facts: dict[str, Any]) -> Table:
    """What watching costs, from one poll of every site to the next."""
    drawn = _table("CPU seconds per interval", "median (min-max)")
    rows = (
        ("controller", "controller_cpu_seconds"),
        ("nothing but reading the sites' answers", "bare_parse_cpu_seconds"),
        ("agents: spent at the sites", "agents_cpu_seconds"),
    )
    for name, key in rows:
        figures = facts[key]
        drawn.add_row(name, f"{figures['median']:.3g} ({figures['min']:.3g}-{figures['max']:.3g})")
    drawn.caption = (
        f"{facts['sites']} simulated sites with {facts['jobs_per_site']:,} jobs each, of which "
        f"{facts['talking_per_site']:,} told a step; polled every {facts['interval_seconds']:.0f} s; "
        f"{facts['cycles']} intervals; {format_bytes(facts['answer_bytes'])} of answers; controller's memory "
        f"{facts['memory_mib']:.0f} MiB, {facts['memory_before_mib']:.0f} MiB before"
    )
    return drawn


def _table(*columns: str) -> Table:
    from rich.table import Table

    drawn = Table()
    for name in columns:
        drawn.add_column(name)
    return drawn
