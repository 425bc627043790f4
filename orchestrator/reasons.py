"""Why a plan says what it says: one line for each thing that is not plain from the run.toml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from checkpoints.formats import QUANTISERS, stored_bytes
from clusters.spread import crossing
from orchestrator.units import format_bytes, format_count, format_duration, format_units, micro_units

if TYPE_CHECKING:
    from orchestrator.plan import IslandPlan, SiteFacts
    from orchestrator.spec import RunSpec


def island_reasons(plan: IslandPlan, layout: str, site: SiteFacts) -> Iterator[str]:
    memory, has = format_bytes(plan.estimated_memory_per_rank_bytes), format_bytes(plan.rank_memory_bytes)
    yield f"{layout} on {plan.ranks} ranks: {memory} of {has} per rank (estimated)"
    yield from _node_reasons(plan)
    peak = f"{site.efficiency:.0%} of {site.rank_flops:.3g} FLOP/s per rank (assumed)"
    yield f"{plan.flops:.3g} FLOPs at {peak}: {format_duration(plan.estimated_seconds)} (estimated)"
    limit, worst = format_duration(plan.time_limit_seconds), format_units(plan.reserved, plan.unit)
    rate = format_units(micro_units(plan.units_per_hour), plan.unit)
    yield f"{worst} are reserved for a segment: {limit} at {rate} per hour, the most it can burn"
    if plan.estimated_segments > 1:
        paid = plan.available // plan.reserved
        yield (
            f"a chain of {plan.estimated_segments} segments (estimated), each reserved before it is "
            f"submitted; {plan.allocation} holds enough for {paid}"
        )


def _node_reasons(plan: IslandPlan) -> Iterator[str]:
    if plan.nodes > 1:
        yield f"{plan.nodes} nodes with {plan.ranks // plan.nodes} of the ranks each"
    across = crossing(plan.ranks, plan.layout["tp"], plan.nodes)
    if across > 1:
        yield f"a tensor-parallel group lies on {across} nodes: every layer waits for their network"


def run_reasons(spec: RunSpec) -> Iterator[str]:
    training, islands = spec.segment_training(), len(spec.islands)
    per_step = training.tokens_per_step * islands
    shares = f" x {islands} islands" if islands > 1 else ""
    whole = f"whole rounds of {spec.rounds.inner_steps}" if spec.rounds else "whole steps"
    asked, given = format_count(spec.training.tokens), format_count(spec.steps * per_step)
    yield (
        f"{asked} tokens / ({training.tokens_per_step} tokens per step{shares}) is "
        f"{spec.training.tokens / per_step:.4g}; rounded up to {whole}: {spec.steps} steps, {given} tokens"
    )
    if spec.start:
        digest = spec.start.sha256[:12]
        yield f"every site starts from its {spec.start.checkpoint}, of manifest sha256 {digest}..."
    if spec.rounds:
        form = QUANTISERS[spec.rounds.quantise]
        size = format_bytes(stored_bytes(form, (0,), (spec.model.parameters,)))
        yield f"each round brings about {size} from each island to the others: every parameter as {form}"
