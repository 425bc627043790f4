"""What a run came to: summary.json, and the table that a person reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.paths import write_atomically
from orchestrator.state import IslandState, RunState
from parallelism.layout import Layout

if TYPE_CHECKING:
    from rich.table import Table


def summarise(state: RunState) -> dict[str, Any]:
    """The keys of summary.json. Seconds by the clock, units in each island's native unit."""
    islands = [_island(state, island) for island in state.islands.values()]
    first = [i.loss_first for i in state.islands.values() if i.loss_first is not None]
    last = [i.loss for i in state.islands.values() if i.loss is not None]
    recoveries = [s for i in state.islands.values() for s in i.recoveries]
    return {
        "run": state.run,
        "outcome": state.outcome,
        "reason": state.reason,
        "loss_first": _mean(first),
        "loss_last": _mean(last),
        "tokens": sum(i["tokens"] for i in islands),
        "tokens_per_second": round(sum(i["tokens_per_second"] for i in islands), 1),
        "islands": islands,
        "rounds": len(state.closed),
        "rounds_closed_without": {str(n): sites for n, sites in state.closed_without.items() if sites},
        "updates_refused": len(state.refused),
        "drift": state.drift["value"] if state.drift else None,
        "bytes_exchanged": state.bytes_exchanged,
        "unit_hours": _units(islands),
        "recovery_seconds": round(sum(recoveries), 3) if recoveries else None,
        "wall_seconds": round((state.ended or state.created) - state.created, 3),
        "faults": state.faults,
        "alerts": state.alerts,
    }


def _island(state: RunState, island: IslandState) -> dict[str, Any]:
    plan = state.plan_of(island.site)
    return {
        "site": island.site,
        "layout": island.layout,
        "ranks": plan["ranks"],
        "restarts": island.restarts,
        "segments": len(island.segments),
        "steps": island.step,
        "loss": island.loss,
        "tokens": island.tokens,
        "tokens_per_second": round(island.mean_tokens_per_second, 1),
        "waited_for_rounds_seconds": round(island.waited_seconds, 3),
        "recoveries_seconds": [round(s, 3) for s in island.recoveries],
        "unit": plan["unit"],
        "unit_hours": island.settled / 1e6,
    }


def _units(islands: list[dict[str, Any]]) -> float | None:
    """The islands' sum; None where they are counted in different units, which are never added up."""
    same = len({island["unit"] for island in islands}) <= 1
    return round(sum(island["unit_hours"] for island in islands), 6) if same else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_summary(path: Path, state: RunState) -> None:
    write_atomically(path, json.dumps(summarise(state), indent=1))


def table(summary: dict[str, Any]) -> Table:
    """The summary as a table, one column per island and one for the run."""
    from rich.table import Table

    islands = summary["islands"]
    drawn = Table(title=f"{summary['run']}: {summary['outcome'] or 'running'}", title_justify="left")
    drawn.add_column("")
    for island in islands:
        drawn.add_column(island["site"], justify="right")
    drawn.add_column("run", justify="right")
    for name, of_island, of_run in _rows(summary):
        drawn.add_row(name, *(of_island(i) for i in islands), of_run)
    return drawn


def _rows(summary: dict[str, Any]) -> list[tuple[str, Any, str]]:
    def loss(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    recovery = summary["recovery_seconds"]
    units = {i["unit"] for i in summary["islands"]}
    return [
        ("layout", lambda i: str(Layout.from_mapping(i["layout"])), ""),
        ("ranks", lambda i: str(i["ranks"]), str(sum(i["ranks"] for i in summary["islands"]))),
        ("steps", lambda i: str(i["steps"]), ""),
        ("loss, first step", lambda _: "", loss(summary["loss_first"])),
        ("loss, last step", lambda i: loss(i["loss"]), loss(summary["loss_last"])),
        ("tokens", lambda i: f"{i['tokens']:,}", f"{summary['tokens']:,}"),
        ("tokens/s", lambda i: f"{i['tokens_per_second']:,.0f}", f"{summary['tokens_per_second']:,.0f}"),
        ("rounds closed", lambda _: "", str(summary["rounds"])),
        ("bytes exchanged", lambda _: "", f"{summary['bytes_exchanged']:,}"),
        ("waited for rounds", lambda i: f"{i['waited_for_rounds_seconds']:.1f} s", ""),
        ("rank restarts", lambda i: str(i["restarts"]), str(sum(i["restarts"] for i in summary["islands"]))),
        ("recovery", lambda i: " ".join(f"{s:.1f} s" for s in i["recoveries_seconds"]),
         "" if recovery is None else f"{recovery:.1f} s"),
        (" / ".join(sorted(units)), lambda i: f"{i['unit_hours']:.4f}",
         "" if summary["unit_hours"] is None else f"{summary['unit_hours']:.4f}"),
        ("wall time", lambda _: "", f"{summary['wall_seconds']:.1f} s"),
    ]  # fmt: skip
