"""A site: a machine of the catalogue, joined with the operator's own part of it in sites.toml."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from clusters.billing import Resources
from clusters.connection import Connection, LocalConnection
from clusters.facts import Fact, check_known, merged
from clusters.groups import Charge, Device, Limits, Node, Partition
from clusters.machine import SHIPPED, Catalogue, Machine
from clusters.own import Own, load_own
from clusters.slurm_queue import LAG_SECONDS
from clusters.ssh import SshConnection

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """One site as the planner and the controller need it. A rank is one training process: a GPU or a core.

    What neither the catalogue nor the operator tells raises ValueError when it is asked for.
    """

    name: str
    machine: Machine
    own: Own

    @property
    def description(self) -> str:
        return self.machine.title

    @property
    def scheduler(self) -> str:
        return self._known(self.machine.scheduler.name, "the scheduler")

    @property
    def scratch(self) -> Path:
        return self.own.scratch

    @property
    def account(self) -> str:
        return self.own.account

    @property
    def python(self) -> str | None:
        return self.own.python

    # ---- how it is watched

    @property
    def is_slurm(self) -> bool:
        return self.scheduler.lower() == "slurm"

    @property
    def watch_seconds(self) -> float:
        """How long one exchange may wait at the site for news: nothing waits on a login node."""
        return 0.0 if self.is_slurm else 5.0

    @property
    def poll_seconds(self) -> float:
        """Between two exchanges."""
        if self.own.poll is not None:
            return self.own.poll.total_seconds()
        return 30.0 if self.is_slurm else 0.0

    @property
    def lag_seconds(self) -> float:
        """An answer "absent" that has not lasted so long is no answer (law 2)."""
        return LAG_SECONDS if self.is_slurm else 5.0

    @property
    def ahead(self) -> int:
        """Segments to keep queued behind the running one, so that a run survives an absent operator."""
        return self.own.ahead if self.own.ahead is not None else int(self.is_slurm)

    def connect(self, home: Path) -> Connection:
        """`home` is the operator's directory, where the budget of ssh calls is kept."""
        if not self.own.host:
            return LocalConnection(self.scratch)
        config = os.environ.get("EUROTRAIN_SSH_CONFIG")  # instead of the operator's ~/.ssh/config
        return SshConnection(
            self.own.host, str(self.scratch), home, config=Path(config) if config else None,
            carrier=self.own.data_mover,
        )  # fmt: skip

    # ---- where jobs go

    @property
    def partition(self) -> Partition:
        """The one the operator chose, or the machine's default, or its only one."""
        known, name = self.machine.partition, self._partition_key
        if not name and known:
            raise ValueError(f"{self._where}: choose a partition: {', '.join(known)}")
        return known.get(name, Partition())

    @property
    def partition_name(self) -> str | None:
        """As sbatch takes it; None leaves the choice to Slurm."""
        return self._slurm_name(self._partition_key, self.partition)

    @property
    def qos(self) -> Limits:
        return self.machine.qos.get(self.own.qos, Limits())

    @property
    def qos_name(self) -> str | None:
        return self._slurm_name(self.own.qos, self.qos)

    @property
    def node(self) -> Node:
        return merged(self.machine.node, self.partition.node)

    @property
    def device(self) -> Device:
        return merged(self.machine.device, self.partition.device)

    @property
    def _partition_key(self) -> str:
        known = self.machine.partition
        default = [name for name, p in known.items() if p.default and p.default.value]
        return self.own.partition or (default[0] if default else next(iter(known)) if len(known) == 1 else "")

    def _slurm_name(self, name: str, limits: Limits) -> str | None:
        told = limits.name.value if limits.name else name
        return told.format(account=self.account) or None

    # ---- limits

    @property
    def max_ranks(self) -> int:
        if self.own.max_ranks is not None:
            return self.own.max_ranks
        gpus = [fact.value for limit in (self.partition, self.qos) if (fact := limit.max_gpus)]
        nodes = self._max_nodes()
        if nodes is not None:
            gpus.append(nodes * self.ranks_per_node)
        return min(gpus) if gpus else self._absent("how many nodes a job may have", "max_ranks")

    def refuses(self, nodes: int) -> str | None:
        """What partition and QOS have against a job of so many nodes; None: nothing that is known."""
        limits = [fact.value for limit in (self.partition, self.qos) if (fact := limit.min_nodes)]
        least, most = max(limits, default=1), self._max_nodes()
        names = [
            self._partition_key and f"partition {self._partition_key}",
            self.own.qos and f"qos {self.own.qos}",
        ]
        where = " with ".join(filter(None, names)) or self.machine.name
        if nodes < least:
            return f"nodes = {nodes}: {where} is for jobs of {least} or more"
        if most is not None and nodes > most and self.own.max_ranks is None:
            return f"nodes = {nodes}: {where} allows {most}"
        return None

    def _max_nodes(self) -> int | None:
        """The smallest of the limits; where there is none, all nodes there are."""
        partition, qos = self.partition, self.qos
        there = partition.nodes or self.machine.node.count
        limits = [fact.value for limit in (partition, qos) if (fact := limit.max_nodes)]
        percents = [fact.value for limit in (partition, qos) if (fact := limit.max_nodes_percent)]
        limits += [there.value * percent // 100 for percent in percents if there]
        return min(limits) if limits else there.value if there else None

    @property
    def max_time_limit_seconds(self) -> float:
        if self.own.max_time is not None:
            return self.own.max_time.total_seconds()
        limits = [fact.value for limit in (self.partition, self.qos) if (fact := limit.max_time)]
        if not limits and self.machine.qos and not self.own.qos:
            raise ValueError(f"{self._where}: choose a qos: {', '.join(self.machine.qos)}")
        return min(limits).total_seconds() if limits else self._absent("the time limit", "max_time")

    # ---- one rank

    @property
    def rank_memory_bytes(self) -> int:
        if self.own.rank_memory_gib is not None:
            return int(self.own.rank_memory_gib * 2**30)
        if self.device.memory_gib:
            return int(self.device.memory_gib.value * 2**30)
        # a vendor's GB is read as 10^9 bytes, the smaller of its two meanings
        return int(self._known(self.device.memory_gb, "a rank's memory", "rank_memory_gib") * 10**9)

    @property
    def rank_flops(self) -> float:
        """Peak, per second."""
        if self.own.rank_tflops is not None:
            return float(self.own.rank_tflops * 10**12)
        return float(self._known(self.device.peak_tflops, "a rank's peak FLOP/s", "rank_tflops") * 10**12)

    @property
    def efficiency(self) -> float:
        """Assumed share of the peak."""
        if self.own.efficiency is not None:
            return float(self.own.efficiency)
        return float(
            self._known(self.device.efficiency, "what share of its peak training reaches", "efficiency")
        )

    @property
    def ranks_per_node(self) -> int:
        told = self.own.ranks_per_node
        return told or self._known(self.device.per_node, "how many GPUs a node has", "ranks_per_node")

    # ---- billing

    @property
    def unit(self) -> str:
        """The native unit of its allocations."""
        if self.own.unit:
            return self.own.unit
        units = list(self._charges)
        if len(units) > 1:
            raise ValueError(f"{self._where}: jobs draw on {' and '.join(units)} at once: choose a unit")
        return units[0] if units else self._absent("the unit of allocations", "unit")

    @property
    def units_per_rank_hour(self) -> float:
        """What a rank burns per hour where its node is full."""
        if self.own.units_per_rank_hour is not None:
            return float(self.own.units_per_rank_hour)
        return self.units_per_hour(self.ranks_per_node) / self.ranks_per_node

    def units_per_hour(self, ranks: int, nodes: int | None = None) -> float:
        """What an allocation with so many ranks burns per hour, in the native unit; on as few nodes as
        hold them, where it is not said."""
        if self.own.units_per_rank_hour is not None:
            return float(ranks * self.own.units_per_rank_hour)
        charges, unit = self._charges, self.unit
        if unit not in charges:
            self._absent(f"how {unit}s are billed", "units_per_rank_hour")
        try:
            return float(charges[unit].formula().per_hour(self.resources(ranks, nodes)))
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}: set units_per_rank_hour") from None

    def resources(self, ranks: int, nodes: int | None = None) -> Resources:
        """What a job of so many ranks holds: each its even share of a node, or whole nodes where they are."""
        per_node, partition, node = self.ranks_per_node, self.partition, self.node
        nodes = nodes or math.ceil(ranks / per_node)
        held = nodes * per_node if partition.whole_nodes and partition.whole_nodes.value else ranks
        share = Fraction(held, per_node)
        cores, memory = node.usable_cores or node.cores, node.slurm_memory_mib
        return Resources(
            nodes=nodes,
            gpus=Fraction(held),
            cores=share * cores.value if cores else None,
            threads=share * node.threads.value if node.threads else None,
            memory_gib=share * memory.value / 1024 if memory else None,
        )

    @property
    def _charges(self) -> dict[str, Charge]:
        return self.machine.charges(self._partition_key)

    # ---- what is not known

    @property
    def _where(self) -> str:
        return f"{self.name} in sites.toml"

    def _known(self, fact: Fact[T] | None, what: str, key: str = "") -> T:
        return self._absent(what, key) if fact is None else fact.value

    def _absent(self, what: str, key: str) -> Any:
        advice = f"; set {key}" if key else ""
        raise ValueError(f"{self._where}: the catalogue does not tell {what}, of {self.machine.name}{advice}")


def catalogue_beside(path: Path) -> Catalogue:
    """The catalogue as an operator sees it: their own files in `catalogue/` beside sites.toml come first."""
    return Catalogue((path.parent / "catalogue", SHIPPED))


def load_sites(path: Path) -> dict[str, Site]:
    """The operator's sites by name. Raises ValueError: what is wrong, where, what is allowed."""
    catalogue = catalogue_beside(path)
    return {name: _site(path, name, own, catalogue) for name, own in load_own(path).items()}


def _site(path: Path, name: str, own: Own, catalogue: Catalogue) -> Site:
    where = f"{path}: [{name}]"
    check_known(f"{where} catalogue", own.catalogue, catalogue.names())
    machine = catalogue.load(own.catalogue)
    for key, known in (("partition", machine.partition), ("qos", machine.qos)):
        if known and getattr(own, key):
            check_known(f"{where} {key}", getattr(own, key), known)
    if own.unit and not own.units_per_rank_hour:
        units = {charge.unit.value for charge in machine.charge.values()}
        check_known(f"{where} unit", own.unit, sorted(units))
    return Site(name, machine, own)
