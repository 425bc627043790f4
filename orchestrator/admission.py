"""Whether a chain's next segment may be submitted now, for how long, and from when. Pure functions.

What limits it: the partition, the QOS and the account (as the site itself tells, where it answers, and as
the catalogue knows), the jobs that are there already, and windows in which nothing runs. A segment is made
shorter to end before a window when that leaves enough to be worth its start; otherwise it begins after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clusters.site import Site
from clusters.windows import Window, parse_window
from orchestrator.state import SegmentState
from orchestrator.units import format_duration

MARGIN_SECONDS = 120.0  # that a segment ends before a window: Slurm may be a minute late with either
WORTHWHILE_SECONDS = 900.0  # less is mostly start, checkpoint and end; a planned half is always enough
LIMITS_LAST_SECONDS = 600.0  # after which the site is asked again


@dataclass(frozen=True)
class Place:
    """What is known of a site beside the log: from the catalogue and from sites.toml."""

    queues: bool = False  # its scheduler tells its limits, and holds a job until it may begin
    most_jobs: int | None = None  # of the operator's, waiting or running
    windows: tuple[Window, ...] = ()


def place_of(site: Site) -> Place:
    """As the operator chose it."""
    limits = (site.partition, site.qos)
    most = [fact.value for limit in limits if (fact := limit.max_submit or limit.max_jobs)]
    return Place(site.is_slurm, min(most, default=None), tuple(map(parse_window, site.own.maintenance)))


@dataclass(frozen=True)
class Admission:
    """`begin`: seconds since 1970, 0 for at once. `reason`: why it is not as planned. Not now: `wait` says
    why; never: `never`."""

    time_limit: float
    begin: float = 0.0
    reason: str = ""
    wait: str = ""
    never: str = ""


def admit(
    plan: Mapping[str, Any], limits: Mapping[str, Any], place: Place, *, start: float, there: int
) -> Admission:
    """`plan`: the island's entry; `limits`: what its site told last; `start`: when the segment may begin at
    the earliest; `there`: how many of the chain's segments are queued or running."""
    planned: float = plan["time_limit_seconds"]
    if closed := limits.get("closed"):
        return Admission(planned, wait=str(closed))
    for most, who in limits.get("nodes", ()):
        if plan.get("nodes", 1) > most:
            return Admission(planned, never=f"{who} lets a job have {most} nodes; this one needs more")
    for most, others, who in _caps(limits, place):
        if others + there >= most:
            held = f"{who} allows {most} jobs at a time; {others} others and {there} of this chain are there"
            return Admission(planned, wait=held)
    shortest, who = min(limits.get("times", ()), default=(planned, ""))
    return _fit(min(planned, shortest), who if shortest < planned else "", plan, limits, place, start)


def _caps(limits: Mapping[str, Any], place: Place) -> Iterator[tuple[int, int, str]]:
    yield from limits.get("jobs", ())
    if place.most_jobs is not None:
        yield place.most_jobs, 0, "the catalogue's limit"


def _fit(
    limit: float, who: str, plan: Mapping[str, Any], limits: Mapping[str, Any], place: Place, start: float
) -> Admission:
    """Around the windows, one after the other."""
    worth = worthwhile(plan)
    reason = f"{who} allows {format_duration(limit)}" if who else ""
    if limit < worth:
        return Admission(limit, never=f"{reason}; less than {format_duration(worth)} is not worth a start")
    begin, at = 0.0, start
    for window in windows(limits, place):
        if window.end <= at or at + limit + MARGIN_SECONDS <= window.start:
            continue
        room = (window.start - at - MARGIN_SECONDS) // 60 * 60
        if room >= worth:
            return Admission(room, begin, f"ends before {window}")
        at, reason = window.end, f"waits for the end of {window}"
        begin = begin if window.by_slurm else at
    if begin and not place.queues:
        return Admission(limit, wait=reason)
    return Admission(limit, begin, reason)


def worthwhile(plan: Mapping[str, Any]) -> float:
    """Seconds that a segment must have at least."""
    return float(min(WORTHWHILE_SECONDS, plan["time_limit_seconds"] / 2))


def windows(limits: Mapping[str, Any], place: Place) -> list[Window]:
    """The site's own and the operator's, in the order of their beginnings."""
    told = [Window.from_json(raw) for raw in limits.get("windows", ())]
    return sorted({*told, *place.windows}, key=lambda w: (w.start, w.end))


def earliest_start(waiting: Sequence[SegmentState], plan: Mapping[str, Any], now: float) -> float:
    """When a segment that is queued behind these begins, if all of them use their time."""
    limits = ((s, s.time_limit or plan["time_limit_seconds"]) for s in waiting)
    left = (limit - (now - s.job["started"] if s.job.get("started") else 0.0) for s, limit in limits)
    return now + sum(max(0.0, seconds) for seconds in left)


def must_drain(segment: SegmentState, plan: Mapping[str, Any], found: Sequence[Window], now: float) -> bool:
    """Whether a running segment would run into a window, and has just the time left to save a checkpoint."""
    started = segment.job.get("started")
    if segment.job["state"] != "running" or not started:
        return False
    ends = started + (segment.time_limit or plan["time_limit_seconds"])
    latest = now + plan["drain_seconds"] + MARGIN_SECONDS
    return any(w.start < ends and started < w.start <= latest and now < w.end for w in found)


def plan_reasons(place: Place, ahead: int, now: float) -> Iterator[str]:
    """What a plan says of it, before the site has been asked."""
    if place.most_jobs is not None and place.most_jobs <= ahead:
        yield f"the catalogue knows a limit of {place.most_jobs} jobs at a time: no more are queued ahead"
    for window in windows({}, place):
        if window.end > now:
            yield f"{window}: segments end before it, or begin after it"
