"""What a supervisor does next: decisions about one segment, without clocks, files or processes."""

from __future__ import annotations

import signal as signals
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from clusters.events import COMPLETED, DRAINED, STARVED
from clusters.segment import EXIT_BAD_INPUT, EXIT_COMPLETED, EXIT_DRAINED, EXIT_STARVED, Segment

CLEAN: Mapping[int | None, str] = {
    EXIT_COMPLETED: COMPLETED,
    EXIT_DRAINED: DRAINED,
    EXIT_STARVED: STARVED,
}


@dataclass(frozen=True)
class End:
    """How a rank ended, as the process that waited for it tells; `note`: why nobody could wait for it."""

    rank: int
    pid: int
    exit_code: int | None
    signal: int | None
    time: float  # seconds since 1970, by the rank's host
    note: str = ""

    @property
    def outcome(self) -> str | None:
        """None: a failure."""
        return CLEAN.get(self.exit_code)

    def __str__(self) -> str:
        if self.signal is not None:
            how = f"was killed by {signals.Signals(self.signal).name}"
        else:
            how = self.note or f"ended with exit code {self.exit_code}"
        return f"rank {self.rank} (process {self.pid}) {how}"


@dataclass(frozen=True)
class Verdict:
    """All is over with `outcome`; or, when that is None, all ranks must be replaced because of `reason`."""

    outcome: str | None
    reason: str = ""
    culprit: int | None = None  # the rank whose log should tell more


def judge(ends: Sequence[End], ranks: int, now: float, patience: float) -> Verdict | None:
    """None as long as the island trains on. `ends`: of this generation, in the order of their times.

    Ranks leave together; one that stays longer than `patience` seconds after the first hangs.
    """
    failures = [end for end in ends if end.outcome is None]
    if failures:
        return Verdict(None, str(failures[0]), failures[0].rank)
    if len({end.outcome for end in ends}) > 1:
        return Verdict(None, "ranks disagree: " + ", ".join(map(str, ends)))
    if len(ends) == ranks:
        return Verdict(ends[0].outcome)
    if ends and now - ends[0].time > patience:
        missing = sorted(set(range(ranks)) - {end.rank for end in ends})
        reason = f"ranks {missing} have not ended {patience:.0f} s after {ends[0]}"
        return Verdict(None, reason, missing[0])
    return None


def bad_input(ends: Iterable[End]) -> End | None:
    """The rank that found its input bad. Its peers may be heard of before it: they die of its end."""
    return next((end for end in ends if end.exit_code == EXIT_BAD_INPUT), None)


def replacements(so_far: int, saved: bool, allowed: int) -> int | None:
    """Count one more replacement of the ranks, from anew when a checkpoint was saved since the last one;
    None when there have been enough of them."""
    counted = 0 if saved else so_far
    return None if counted >= allowed else counted + 1


def units(segment: Segment, elapsed: float) -> float:
    """What the segment has burnt after so many seconds, in its site's unit."""
    return segment.units_per_hour * elapsed / 3600.0


def drain_reason(segment: Segment, elapsed: float, stop: bool, signalled: bool) -> str | None:
    """Why the segment must save a checkpoint and end, `elapsed` seconds after its start."""
    ahead = elapsed + segment.drain_seconds
    if stop:
        return "stop requested"
    if signalled:
        return "signal received"
    if ahead >= segment.time_limit_seconds:
        return f"time limit of {segment.time_limit_seconds:.0f} s"
    if units(segment, ahead) >= segment.unit_cap:
        return f"unit cap of {segment.unit_cap:g}"
    return None


@dataclass(frozen=True)
class Place:
    """Where a rank can be reached by the others: `port` was free there a moment ago."""

    address: str
    port: int
    interface: str  # that has the address


def rank_environments(
    places: Sequence[Place], generation: int, told: Collection[str] = ()
) -> list[dict[str, str]]:
    """What torch.distributed wants to know, for each rank.

    Gloo picks its interface by the host's name, which may lead nowhere (in a container: to an address of
    no interface); NCCL takes the first it finds. Both are told the one that the ranks reach each other by,
    except NCCL where the job's environment (`told`: the names in it) has a word on that already.
    """
    seen: Counter[str] = Counter()
    environments = []
    for rank, place in enumerate(places):
        own = {"RANK": rank, "LOCAL_RANK": seen[place.address], "WORLD_SIZE": len(places)}
        common = {"MASTER_ADDR": places[0].address, "MASTER_PORT": places[0].port}
        names = {"EUROTRAIN_GENERATION": generation, "GLOO_SOCKET_IFNAME": place.interface}
        seen[place.address] += 1
        environments.append({name: str(value) for name, value in {**own, **common, **names}.items()})
    if len(seen) > 1 and "NCCL_SOCKET_IFNAME" not in told:
        for place, environment in zip(places, environments, strict=True):
            environment["NCCL_SOCKET_IFNAME"] = f"={place.interface}"  # "=": this name, not a beginning
    return environments
