"""What an island's chain of segments may do next: law 3, and whether it needs another one. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clusters.events import DRAINED
from orchestrator.state import IslandState, SegmentState

# Slurm keeps time limits in minutes, and may signal their end so much early (sbatch(1), --signal).
_EARLY_SECONDS = 60.0


def why_stuck(island: IslandState, plan: Mapping[str, Any]) -> str | None:
    """Why no other segment may follow (law 3); None where one may. `plan`: the plan's entry of the island."""
    ended = [s for s in island.segments[island.forgiven :] if s.settled is not None]
    last = next((s for s in reversed(ended) if s.final), None)
    if last is not None:
        return f"another segment would fail alike: {last.reason}"
    telling = _telling(ended, plan)
    if len(telling) < 2 or any(s.checkpoints for s in telling[-2:]):
        return None
    why = telling[-1].reason or telling[-1].outcome or "it ended without a word"
    return f"two segments without a new checkpoint (law 3); the last: {why}"


def _telling(ended: Sequence[SegmentState], plan: Mapping[str, Any]) -> list[SegmentState]:
    """Segments whose end says something about the chain.

    Those that others ended before they trained do not; but when these have burnt as much together as one
    segment may, they count as one, or a site that preempts every segment would be paid for ever.
    """
    found, burnt = [], 0
    for segment in ended:
        burnt += segment.settled or 0
        if not _ended_by_others(segment, plan) or burnt > segment.reserved:
            found.append(segment)
            burnt = 0
    return found


def _ended_by_others(segment: SegmentState, plan: Mapping[str, Any]) -> bool:
    """Stopped, cancelled or preempted before its first step; its own time limit is nobody else's doing."""
    job = segment.job
    least: float = (segment.time_limit or plan["time_limit_seconds"]) - plan["drain_seconds"] - _EARLY_SECONDS
    if segment.trained or segment.checkpoints:
        return False
    if segment.outcome == DRAINED and segment.reason == "stop requested":
        return True
    if job["outcome"] != "cancelled":
        return False
    return not job.get("started") or bool(job["ended"] - job["started"] < least)


def enough_queued(
    island: IslandState, waiting: Sequence[SegmentState], plan: Mapping[str, Any], now: float
) -> bool:
    """Whether the segments that are not over will finish the island's training."""
    if island.seconds_per_step is None:
        return bool(len(island.segments) >= plan["estimated_segments"])
    planned, drain = plan["time_limit_seconds"], plan["drain_seconds"]
    running = sum(max(0.0, (s.time_limit or planned) - drain - _elapsed(s, now)) for s in waiting)
    return bool((plan["steps"] - island.step) * island.seconds_per_step <= running)


def _elapsed(segment: SegmentState, now: float) -> float:
    return now - segment.job["started"] if segment.job.get("started") else 0.0
