"""What the coordinator makes of updates before a round is closed: outliers, drift and resets. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from clusters.segment import Rounds
from orchestrator.state import RunState

_WINDOW = 10  # closed rounds whose updates' norms a new one is compared with
_ENOUGH = 3  # norms, before any is called an outlier


@dataclass(frozen=True)
class Drift:
    """The largest relative difference of a tensor between the bases of two islands."""

    value: float
    tensor: str
    sites: tuple[str, str]


def drift(sketches: Mapping[str, Mapping[str, Sequence[float]]]) -> Drift | None:
    """Estimated from the sketches of the same base (parallelism/drift.py) by site; None for one alone."""
    found = [
        Drift(_distance(sketches[a][tensor], sketches[b][tensor]), tensor, (a, b))
        for a, b in itertools.combinations(sorted(sketches), 2)
        for tensor in sorted(sketches[a].keys() & sketches[b].keys())
    ]
    return max(found, key=lambda one: one.value, default=None)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """|a - b| / |a| of two tensors: projections onto random signs, then the sum of squares."""
    squares = [(x - y) ** 2 for x, y in zip(a[:-1], b[:-1], strict=True)]
    if not any(squares) and a[-1] == b[-1]:
        return 0.0
    largest = max(a[-1], b[-1])
    return math.sqrt(sum(squares) / len(squares) / largest) if largest > 0 else math.inf


def outlier(norm: float, state: RunState) -> str | None:
    """Why an update of this norm takes no part in a round; None when it may."""
    if not math.isfinite(norm):
        return "it is not finite"
    recent = [
        state.norms[closed.number, part.site]
        for closed in state.closed[-_WINDOW:]
        for part in closed.contributions
        if (closed.number, part.site) in state.norms
    ]
    if len(recent) < _ENOUGH:
        return None
    median, ratio = statistics.median(recent), rules(state).max_norm_ratio
    if norm <= ratio * median:
        return None
    known = f"the median of {len(recent)} before it is {median:.4g}"
    return f"its norm is {norm:.4g}, {known}; rounds.max_norm_ratio allows {ratio:g} times that"


def exceeds(found: Drift | None, state: RunState) -> bool:
    return found is not None and found.value > rules(state).max_drift


def reset_from(state: RunState, sites: Collection[str], found: Drift | None) -> str:
    """Whose state all islands take in the round after the one that is closed now with updates of `sites`;
    "" for nobody's. Due every `reset_every` rounds, when bases have drifted too far, and when the one
    that was named last was not in time."""
    number = len(state.closed) + 1
    named = state.closed[-1].reset_from if state.closed else ""
    happens_now = named in sites
    due = (number + 1) % rules(state).reset_every == 0
    due |= bool(named) and not happens_now
    due |= exceeds(found, state) and not happens_now
    return min(sites) if due and len(state.islands) > 1 else ""


def rules(state: RunState) -> Rounds:
    """What the user asked for, as far as an old plan tells it."""
    return Rounds(**state.plan["rounds"])
