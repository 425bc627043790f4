"""A plan's island as segments: what each one is told, what it may burn, how long it drains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from clusters.segment import Segment

if TYPE_CHECKING:
    from orchestrator.plan import Plan

# A drain saves a checkpoint and waits for the slowest rank: a minute, or a quarter of a very short segment.
DRAIN_SECONDS = 60.0


def reservation(units_per_hour: float, seconds: float) -> int:
    """Micro-units that a segment can burn at most: so many are reserved."""
    return math.ceil(seconds / 3600 * units_per_hour * 1e6)


def drain_seconds(time_limit: float) -> float:
    return min(DRAIN_SECONDS, time_limit / 4)


def segment_for(
    plan: Plan, run: str, site: str, sequence: int, scratch: str, time_limit: float = 0.0
) -> Segment:
    """The `sequence`-th segment of an island's chain: the same for the same arguments, for ever (law 1).

    `time_limit` in seconds, where it is not the planned one."""
    index, island = next((n, i) for n, i in enumerate(plan.islands) if i.site == site)
    limit = time_limit or island.time_limit_seconds
    return Segment(
        key=f"{run}.{site}.{sequence:04d}",
        run=run,
        site=site,
        island=index,
        islands=len(plan.islands),
        sequence=sequence,
        scratch=scratch,
        layout=dict(island.layout),
        model=plan.model,
        training=plan.training,
        data=plan.data,
        checkpointing=plan.checkpointing,
        rounds=plan.rounds,
        start=plan.start,
        time_limit_seconds=limit,
        units_per_hour=island.units_per_hour,
        unit_cap=reservation(island.units_per_hour, limit) / 1e6,
        drain_seconds=drain_seconds(limit),
    )
