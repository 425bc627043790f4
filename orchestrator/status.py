"""What each island of a run does now: `eurotrain status`, as JSON and as a table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from clusters.windows import Window
from orchestrator.exclusion import LASTS_SECONDS, excluded
from orchestrator.state import IslandState, RunState
from orchestrator.units import format_count, format_duration

if TYPE_CHECKING:
    from rich.table import Table


def status(state: RunState, coordinator: str | None) -> dict[str, Any]:
    """A run's progress. Keys are stable; times in seconds, tokens of all islands together."""
    now = time.time()
    tokens = sum(i.tokens for i in state.islands.values())
    rates = [_rate(state, island) or 0.0 for island in state.islands.values()]
    return {
        "run": state.run,
        "outcome": state.outcome,
        "reason": state.reason,
        "stop_requested": state.stop_requested,
        "coordinator": coordinator,
        "age_seconds": round((state.ended or now) - state.created, 1),
        "tokens": tokens,
        "tokens_planned": state.plan["tokens"],
        "tokens_per_second": round(sum(rates), 1),
        "rounds": len(state.closed),
        "drift": state.drift,
        "updates_refused": [
            {"round": number, "site": site, "reason": reason}
            for (number, site), reason in state.refused.items()
        ],
        "islands": [_island(state, island, now) for island in state.islands.values()],
        "alerts": state.alerts,
    }


def _island(state: RunState, island: IslandState, now: float) -> dict[str, Any]:
    plan = state.plan_of(island.site)
    last = island.segments[-1] if island.segments else None
    return {
        "site": island.site,
        "layout": island.layout,
        "ranks": plan["ranks"],
        "activity": island.activity if state.outcome is None or island.done else state.outcome,
        "step": island.step,
        "steps": plan["steps"],
        "loss": island.loss,
        "tokens_per_second": _rate(state, island),
        "checkpoint_step": island.checkpoint_step,
        "round": island.applied_round,
        "restarts": island.restarts,
        "segment": last.key if last else None,
        "job_id": last.job.get("job_id") if last else None,
        "job_state": last.job["state"] if last else None,
        "pids": island.ranks,
        "held": island.held,
        "windows": [w for w in island.limits.get("windows", ()) if w["end"] > now],
        "excluded": _excluded(island, now),
    }


def _excluded(island: IslandState, now: float) -> list[dict[str, Any]]:
    """Nodes that the chain keeps away from, since when, until when, and why."""
    return [
        {
            "node": node,
            "since": evidence[0].time,
            "until": evidence[-1].time + LASTS_SECONDS,
            "evidence": [e.text for e in evidence],
        }
        for node, evidence in excluded(island, now).items()
    ]


def _rate(state: RunState, island: IslandState) -> float | None:
    """Tokens/s now, or of the whole run when it is over."""
    return island.tokens_per_second if state.outcome is None else island.mean_tokens_per_second


def table(facts: dict[str, Any]) -> Table:
    """The status as a person reads it."""
    from rich.table import Table

    share = 100 * facts["tokens"] / facts["tokens_planned"] if facts["tokens_planned"] else 0.0
    head = (
        f"{facts['run']}: {facts['outcome'] or 'running'}, {format_duration(facts['age_seconds'])}; "
        f"{format_count(facts['tokens'])} of {format_count(facts['tokens_planned'])} tokens ({share:.0f} %), "
        f"{facts['tokens_per_second']:,.0f} tokens/s, {facts['rounds']} rounds closed"
        + _drift(facts["drift"])
    )
    drawn = Table(title=head, title_justify="left", caption=_caption(facts), caption_justify="left")
    for name in (
        "site",
        "ranks",
        "step",
        "loss",
        "tokens/s",
        "checkpoint",
        "round",
        "restarts",
        "job",
        "now",
    ):
        drawn.add_column(name, justify="left" if name in ("site", "now") else "right")
    for island in facts["islands"]:
        drawn.add_row(*_cells(island))
    return drawn


def _drift(drift: dict[str, Any] | None) -> str:
    if drift is None:
        return ""
    return f", bases {drift['value']:.0e} apart" if drift["value"] else ", bases equal"


def _cells(island: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        island["site"],
        str(island["ranks"]),
        f"{island['step']}/{island['steps']}",
        number(island["loss"], ".4f"),
        number(island["tokens_per_second"], ",.0f"),
        number(island["checkpoint_step"], "d"),
        str(island["round"]),
        str(island["restarts"]),
        f"{island['job_id'] or '-'} {island['job_state'] or ''}".strip(),
        island["activity"],
    ]


def _exclusion(site: str, told: dict[str, Any]) -> str:
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(told["until"]))
    return f"{site} keeps away from {told['node']} until {until}: {told['evidence'][-1]}"


def _caption(facts: dict[str, Any]) -> str | None:
    lines = [f"! {text}" for text in facts["alerts"][-5:]]
    lines += [f"{i['site']}: {Window.from_json(w)}" for i in facts["islands"] for w in i["windows"]]
    lines += [_exclusion(island["site"], told) for island in facts["islands"] for told in island["excluded"]]
    if facts["outcome"] is None and facts["coordinator"] is None:
        lines.append(f"nobody coordinates this run: eurotrain resume {facts['run']}")
    if facts["reason"]:
        lines.append(facts["reason"])
    return "\n".join(lines) or None
