"""What a run will take before anything starts: ranks, memory, steps, time, units, each with its reason.

Memory, seconds and units are estimates, and are named so; reservations are not: a segment can burn no
more than its time limit times what its allocation burns per hour. Amounts are in micro-units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ConfigDict, TypeAdapter, ValidationError

from clusters.segment import Checkpointing, Data, ModelShape, Rounds, Start, Training
from clusters.spread import spread
from orchestrator.reasons import island_reasons, run_reasons
from orchestrator.segments import drain_seconds, reservation
from orchestrator.spec import Island, RunSpec
from orchestrator.suggest import unknown
from orchestrator.units import format_bytes, format_duration, format_units, micro_units
from parallelism.costs import flops_per_token, memory_per_rank

if TYPE_CHECKING:
    from orchestrator.ledger import Balance

_STRICT = ConfigDict(extra="forbid")


class SiteFacts(Protocol):
    """What a plan needs to know of a site. Ranks are training processes: a GPU or a core each."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...  # the native unit of its allocations
    @property
    def rank_memory_bytes(self) -> int: ...
    @property
    def rank_flops(self) -> float: ...  # peak per second
    @property
    def efficiency(self) -> float: ...  # assumed share of that peak
    @property
    def max_ranks(self) -> int: ...
    @property
    def ranks_per_node(self) -> int: ...
    @property
    def max_time_limit_seconds(self) -> float: ...
    def refuses(self, nodes: int) -> str | None: ...  # why a job may not have so many
    def units_per_hour(self, ranks: int, nodes: int) -> float: ...


class Budget(Protocol):
    """What a plan needs of the ledger."""

    def allocations(self) -> list[str]: ...
    def balance(self, allocation: str) -> Balance: ...


@dataclass(frozen=True)
class IslandPlan:
    """One island: `reserved` and `estimated_units` in micro-units, one for a segment, one for the island."""

    __pydantic_config__ = _STRICT

    site: str
    allocation: str
    layout: Mapping[str, int | bool]  # fields of parallelism.layout.Layout
    ranks: int
    nodes: int
    steps: int
    tokens: int
    flops: int
    estimated_memory_per_rank_bytes: int
    rank_memory_bytes: int
    estimated_seconds: float
    estimated_units: int
    unit: str
    units_per_hour: float
    time_limit_seconds: float
    drain_seconds: float
    reserved: int  # for each segment: the worst case
    available: int  # in the allocation when this was planned
    estimated_segments: int
    reasons: tuple[str, ...]
    bundle: str = ""  # what its segments run from: staged, named by contents


@dataclass(frozen=True)
class Plan:
    """A whole run, with everything its segments need to know."""

    __pydantic_config__ = _STRICT

    name: str
    tokens: int
    steps: int
    rounds_planned: int
    parameters: int
    model: ModelShape
    training: Training
    data: Data
    checkpointing: Checkpointing
    rounds: Rounds | None
    islands: tuple[IslandPlan, ...]
    totals: Mapping[str, Mapping[str, int]]  # by unit: estimated_units of the run, reserved at its start
    reasons: tuple[str, ...]
    start: Start | None = None
    files: tuple[tuple[str, int, str], ...] = ()  # staged, the same everywhere: path, bytes, SHA-256

    def to_json(self) -> dict[str, Any]:
        return dict(_adapter().dump_python(self, mode="json"))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Plan:
        """Raises ValueError when this is not a plan of this version."""
        try:
            return _adapter().validate_python(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"not a plan of this version of eurotrain: {where}: {first['msg']}") from None


@functools.cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def make_plan(spec: RunSpec, sites: Mapping[str, SiteFacts], budget: Budget) -> Plan:
    """Raises ValueError, one line per obstacle, when the run cannot be launched so."""
    refusals = [line for island in spec.islands for line in _obstacles(spec, island, sites, budget)]
    if refusals:
        raise ValueError("\n".join(refusals))
    islands = tuple(
        _island(spec, i, sites[i.site], budget.balance(i.allocation).available) for i in spec.islands
    )
    refusals = list(_overdrafts(islands, budget))
    if refusals:
        raise ValueError("\n".join(refusals))
    return Plan(
        name=spec.name,
        tokens=sum(island.tokens for island in islands),
        steps=spec.steps,
        rounds_planned=spec.steps // spec.rounds.inner_steps if spec.rounds else 0,
        parameters=spec.model.parameters,
        model=spec.model,
        training=spec.segment_training(),
        data=spec.segment_data(),
        checkpointing=spec.segment_checkpointing(),
        rounds=spec.segment_rounds(),
        islands=islands,
        totals=_totals(islands),
        reasons=tuple(run_reasons(spec)),
        start=spec.start,
    )


def _memory(spec: RunSpec, island: Island) -> int:
    training = spec.segment_training()
    return memory_per_rank(spec.model, training, island.layout, rounds=spec.rounds is not None)


def _obstacles(
    spec: RunSpec, island: Island, sites: Mapping[str, SiteFacts], budget: Budget
) -> Iterator[str]:
    where = f"islands.{island.site}"
    site = sites.get(island.site)
    if site is None:
        yield f"{where}: {unknown('site', island.site, sites)}"
        return
    if island.layout.ranks > site.max_ranks:
        yield f"{where}: {island.layout} needs {island.layout.ranks} ranks; {site.name} has {site.max_ranks}"
    try:
        problem = site.refuses(_nodes(island, site))
    except ValueError as error:
        problem = str(error)
    if problem:
        yield f"{where}: {problem}"
    if island.time_limit_seconds > site.max_time_limit_seconds:
        asked, most = map(format_duration, (island.time_limit_seconds, site.max_time_limit_seconds))
        yield f"{where}.time_limit is {asked}; {site.name} allows {most}"
    memory = _memory(spec, island)
    if memory > site.rank_memory_bytes:
        need, have = format_bytes(memory), format_bytes(site.rank_memory_bytes)
        yield f"{where}: {island.layout} needs {need} per rank (estimated); a rank of {site.name} has {have}"
    if island.allocation not in budget.allocations():
        yield f"{where}: {unknown('allocation', island.allocation, budget.allocations())}"
    elif (unit := budget.balance(island.allocation).unit) != site.unit:
        yield f"{where}: allocation {island.allocation!r} holds {unit}s, and {site.name} counts {site.unit}s"


def _nodes(island: Island, site: SiteFacts) -> int:
    return spread(island.layout.ranks, island.layout.tp, site.ranks_per_node, island.nodes)


def _overdrafts(islands: tuple[IslandPlan, ...], budget: Budget) -> Iterator[str]:
    """Allocations that cannot pay the first segments, of all islands that draw on them together."""
    for allocation in dict.fromkeys(island.allocation for island in islands):
        drawing = [island for island in islands if island.allocation == allocation]
        asked, balance = sum(island.reserved for island in drawing), budget.balance(allocation)
        if asked > balance.available:
            names = " and ".join(f"islands.{island.site}" for island in drawing)
            need = format_units(asked, balance.unit, exact=True)
            yield f"{names}: a segment may burn {need}; allocation {allocation!r} has {balance}"


def _island(spec: RunSpec, island: Island, site: SiteFacts, available: int) -> IslandPlan:
    training, ranks, nodes = spec.segment_training(), island.layout.ranks, _nodes(island, site)
    tokens = training.steps * training.tokens_per_step
    flops = tokens * flops_per_token(spec.model, training.sequence_length)
    seconds = flops / (ranks * site.rank_flops * site.efficiency)
    per_hour = site.units_per_hour(ranks, nodes)
    drain = drain_seconds(island.time_limit_seconds)
    plan = IslandPlan(
        site=island.site,
        allocation=island.allocation,
        layout=asdict(island.layout),
        ranks=ranks,
        nodes=nodes,
        steps=training.steps,
        tokens=tokens,
        flops=flops,
        estimated_memory_per_rank_bytes=_memory(spec, island),
        rank_memory_bytes=site.rank_memory_bytes,
        estimated_seconds=seconds,
        estimated_units=micro_units(seconds / 3600 * per_hour),
        unit=site.unit,
        units_per_hour=per_hour,
        time_limit_seconds=island.time_limit_seconds,
        drain_seconds=drain,
        reserved=reservation(per_hour, island.time_limit_seconds),
        available=available,
        estimated_segments=math.ceil(seconds / (island.time_limit_seconds - drain)),
        reasons=(),
    )
    return replace(plan, reasons=tuple(island_reasons(plan, str(island.layout), site)))


def _totals(islands: tuple[IslandPlan, ...]) -> dict[str, dict[str, int]]:
    """Units of different sites are not added up: a core-hour is no node-hour."""
    return {
        unit: {
            "estimated_units": sum(i.estimated_units for i in islands if i.unit == unit),
            "reserved": sum(i.reserved for i in islands if i.unit == unit),
        }
        for unit in dict.fromkeys(i.unit for i in islands)
    }
