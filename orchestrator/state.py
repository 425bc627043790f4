"""What is known of a run: the fold of its events. Nothing here is ever stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from clusters.rounds import ClosedRound, genesis

_RATE_WINDOW = 20  # steps that tokens/s is averaged over


class Event(Protocol):
    """An event as the store keeps it."""

    @property
    def site(self) -> str: ...
    @property
    def segment(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def time(self) -> float: ...
    @property
    def received(self) -> float: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Evidence:
    """What speaks against a node: `host` as whoever noticed calls it, `time` when the controller heard."""

    host: str
    segment: str
    time: float
    text: str


# What every job waits for once: not worth a word. Others an operator may have to do something about.
_USUAL = frozenset(("", "None", "Priority", "Resources", "Dependency"))


def waits_for(job: Mapping[str, Any]) -> str:
    """Slurm's reason why a job does not start, where it is not only its turn."""
    reason = str(job.get("reason") or "") if job["state"] == "pending" else ""
    return "" if reason in _USUAL else reason


@dataclass
class SegmentState:
    """One segment of an island's chain."""

    key: str
    site: str
    sequence: int
    reserved: int  # micro-units
    after: str = ""  # key of the segment that has to end first
    time_limit: float = 0.0  # seconds; 0: as planned
    begin: float = 0.0  # not before; 0: as soon as it can
    job: dict[str, Any] = field(default_factory=lambda: {"state": "intended"})
    outcome: str | None = None  # the supervisor's word, where it had the time to give one
    reason: str = ""
    final: bool = False  # another segment would end alike
    trained: bool = False  # it completed a step
    checkpoints: int = 0
    generations: int = 0  # times that its ranks were started
    nodes: frozenset[str] = frozenset()  # all that Slurm ever said it had
    excludes: tuple[str, ...] = ()  # nodes that its job was told to keep away from
    settled: int | None = None  # micro-units
    released: bool = False

    @property
    def over(self) -> bool:
        """Neither running nor able to: its units are booked or free again."""
        return self.settled is not None or self.released

    @property
    def live(self) -> bool:
        return self.job["state"] in ("pending", "running")


@dataclass
class IslandState:
    """The part of the run at one site."""

    site: str
    layout: dict[str, int | bool]
    segments: list[SegmentState] = field(default_factory=list)
    by_key: dict[str, SegmentState] = field(default_factory=dict)  # the same segments
    activity: str = "waiting for its first segment"
    step: int = 0
    loss: float | None = None
    loss_first: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int = 0  # of the current line of training; what a restart repeats is not counted twice
    trained_seconds: float = 0.0  # inside steps, repetitions included
    rates: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RATE_WINDOW))
    first_step_began: float | None = None  # by the site's clock
    last_step_ended: float = 0.0
    checkpoint_step: int | None = None
    contributions: dict[int, dict[str, Any]] = field(default_factory=dict)
    applied_round: int = 0
    waited_seconds: float = 0.0
    ranks: dict[int, int] = field(default_factory=dict)  # rank -> pid, of the generation that trains
    hosts: dict[int, str] = field(default_factory=dict)  # rank -> host, of the generation that trains
    evidence: list[Evidence] = field(default_factory=list)  # against nodes: orchestrator/exclusion.py
    deaths: dict[str, list[str]] = field(default_factory=dict)  # by host, since the last checkpoint
    restarts: int = 0
    died_at: float | None = None  # by the site's clock, until the next completed step
    recoveries: list[float] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)  # as its site told them last
    held: str = ""  # what its next segment waits for
    completed: bool = False
    given_up: str | None = None
    forgiven: int = 0  # segments that ended before an operator resumed the chain after it was given up

    @property
    def done(self) -> bool:
        return self.completed or self.given_up is not None

    @property
    def tokens_per_second(self) -> float | None:
        """Now: over the last steps, waiting for rounds and checkpoints not counted."""
        seconds = sum(s for _, s in self.rates)
        return sum(t for t, _ in self.rates) / seconds if seconds else None

    @property
    def seconds_per_step(self) -> float | None:
        """Over the last steps, waiting for rounds and checkpoints not counted."""
        return sum(s for _, s in self.rates) / len(self.rates) if self.rates else None

    @property
    def mean_tokens_per_second(self) -> float:
        """From the first step to the last: rounds, checkpoints and recoveries counted."""
        if self.first_step_began is None or self.last_step_ended <= self.first_step_began:
            return 0.0
        return self.tokens / (self.last_step_ended - self.first_step_began)

    @property
    def settled(self) -> int:
        """Micro-units booked so far."""
        return sum(s.settled or 0 for s in self.segments)


@dataclass
class RunState:
    """A run and its islands."""

    run: str
    plan: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0
    islands: dict[str, IslandState] = field(default_factory=dict)
    closed: list[ClosedRound] = field(default_factory=list)
    closed_without: dict[int, list[str]] = field(default_factory=dict)
    collected: set[tuple[int, str]] = field(default_factory=set)
    refused: dict[tuple[int, str], str] = field(default_factory=dict)
    discarded: set[tuple[int, str]] = field(default_factory=set)  # of those, what is of no use ever
    norms: dict[tuple[int, str], float] = field(default_factory=dict)  # of collected updates
    drift: dict[str, Any] | None = None  # of the last round in which two islands took part
    delivered: set[tuple[int, str]] = field(default_factory=set)
    bytes_exchanged: int = 0
    stop_requested: bool = False
    outcome: str | None = None
    reason: str = ""
    ended: float | None = None
    alerts: list[str] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def base(self) -> str:
        """Identity of the last closed round."""
        return self.closed[-1].identity if self.closed else genesis(self.run)

    def segment(self, key: str) -> SegmentState:
        return next(i.by_key[key] for i in self.islands.values() if key in i.by_key)

    def plan_of(self, site: str) -> dict[str, Any]:
        """The plan's entry of an island."""
        entry: dict[str, Any] = next(i for i in self.plan["islands"] if i["site"] == site)
        return entry
