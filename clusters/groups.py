"""The groups of facts that the catalogue knows of a machine. What nobody told is None or empty.

Sizes: `gb` is as the source writes it; `gib` and `mib` are powers of two, and so is every memory that Slurm
counts. GPUs are counted as Slurm counts them. A field's name is its key in the machine's file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from clusters.billing import Rule, make_rule
from clusters.facts import Fact


@dataclass(frozen=True)
class Scheduler:
    """Who decides what runs when."""

    name: Fact[str] | None = None
    version: Fact[str] | None = None
    launcher: Fact[str] | None = None
    requeue: Fact[str] | None = None
    maintenance: Fact[str] | None = None
    must_give: Fact[tuple[str, ...]] | None = None  # options of sbatch without which a job is refused
    gpu_option: Fact[str] | None = None  # how GPUs are asked for
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Node:
    """One compute node."""

    count: Fact[int] | None = None
    cpu: Fact[str] | None = None
    architecture: Fact[str] | None = None
    cores: Fact[int] | None = None
    usable_cores: Fact[int] | None = None
    threads: Fact[int] | None = None
    memory_gb: Fact[Decimal] | None = None
    slurm_memory_mib: Fact[int] | None = None  # what jobs can ask for
    local_disk: Fact[str] | None = None
    nics: Fact[int] | None = None
    nic_gbit_s: Fact[Decimal] | None = None  # of each
    fabric: Fact[str] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Device:
    """What one rank computes on: a GPU as Slurm counts it, or a core where there is none."""

    name: Fact[str] | None = None
    per_node: Fact[int] | None = None
    billed_per_node: Fact[int] | None = None
    gres: Fact[str] | None = None
    memory_gb: Fact[Decimal] | None = None
    memory_gib: Fact[Decimal] | None = None  # as programs see it
    peak_tflops: Fact[Decimal] | None = None  # dense, in the precision of training: bf16 on GPUs
    bandwidth_tb_s: Fact[Decimal] | None = None
    power_w: Fact[Decimal] | None = None
    efficiency: Fact[Decimal] | None = None  # share of the peak that training reached
    numa: Fact[tuple[int, ...]] | None = None  # NUMA node of device 0, 1, ...
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Limits:
    """What a partition or a QOS allows a job, or a user at a time. `name` is Slurm's, where ours differs."""

    name: Fact[str] | None = None
    max_time: Fact[timedelta] | None = None
    default_time: Fact[timedelta] | None = None
    min_nodes: Fact[int] | None = None
    max_nodes: Fact[int] | None = None
    max_nodes_percent: Fact[int] | None = None  # of the partition's nodes
    max_gpus: Fact[int] | None = None
    max_cpus: Fact[int] | None = None
    max_jobs: Fact[int] | None = None
    max_running: Fact[int] | None = None
    max_submit: Fact[int] | None = None
    priority: Fact[int] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Partition(Limits):
    """A partition; `node` and `device` hold what differs there."""

    cluster: Fact[str] | None = None  # where one machine is run as several
    default: Fact[bool] | None = None
    nodes: Fact[int] | None = None
    whole_nodes: Fact[bool] | None = None  # allocated, whatever a job asks for
    billed: Fact[bool] | None = None
    internet: Fact[bool] | None = None
    preemption: Fact[str] | None = None
    node: Node | None = None
    device: Device | None = None


@dataclass(frozen=True)
class Launch:
    """How ranks are started and bound."""

    tasks_per_node: Fact[int] | None = None
    cpus_per_task: Fact[int] | None = None
    cpu_bind: Fact[str] | None = None
    srun: Fact[tuple[str, ...]] | None = None
    master_address: Fact[str] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Network:
    """Who reaches what."""

    compute_outbound: Fact[bool] | None = None
    login_outbound: Fact[bool] | None = None
    login_outbound_ports: Fact[tuple[int, ...]] | None = None
    outbound_range: Fact[str] | None = None
    data_movers: Fact[tuple[str, ...]] | None = None
    object_storage: Fact[str] | None = None
    rest: Fact[tuple[str, ...]] | None = None
    globus: Fact[bool] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Login:
    """How a person comes in."""

    hosts: Fact[tuple[str, ...]] | None = None
    port: Fact[int] | None = None
    jump_host: Fact[str] | None = None
    method: Fact[str] | None = None
    second_factor: Fact[str] | None = None
    certificate_hours: Fact[Decimal] | None = None
    unattended: Fact[str] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class FileSystem:
    path: Fact[str] | None = None
    quota_gb: Fact[Decimal] | None = None
    quota_gib: Fact[Decimal] | None = None
    inodes: Fact[int] | None = None
    purge_days: Fact[int] | None = None
    purge_active: Fact[bool] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Billing:
    """What is told of accounting beside the formulas of `charges`."""

    command: Fact[str] | None = None
    sample: Fact[str] | None = None  # of the command's output
    authority: Fact[str] | None = None
    lag: Fact[str] | None = None
    windows: Fact[str] | None = None
    over_budget: Fact[str] | None = None
    expiry: Fact[str] | None = None
    account_suffix: Fact[str] | None = None
    storage: Fact[str] | None = None
    price: Fact[str] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Charge:
    """One formula: what jobs in `partitions` (or in all that no other charge names) burn of `unit`."""

    unit: Fact[str]
    rule: Fact[str]
    partitions: Fact[tuple[str, ...]] | None = None
    per_node_hour: Fact[Decimal] | None = None
    per_slice_hour: Fact[Decimal] | None = None
    gpus_per_slice: Fact[Decimal] | None = None
    cores_per_slice: Fact[Decimal] | None = None
    memory_gib_per_slice: Fact[Decimal] | None = None
    whole_slices: Fact[bool] | None = None
    per_gpu_hour: Fact[Decimal] | None = None
    per_thread_hour: Fact[Decimal] | None = None
    per_memory_gib_hour: Fact[Decimal] | None = None
    notes: tuple[Fact[str], ...] = ()

    def formula(self, where: str = "charge") -> Rule:
        """Raises ValueError when the rule and its parameters do not fit."""
        others = ("unit", "rule", "partitions", "notes")
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in others}
        return make_rule(where, self.rule.value, {key: fact.value for key, fact in told.items() if fact})


@dataclass(frozen=True)
class Software:
    container: Fact[str] | None = None
    modules: Fact[str] | None = None
    collectives: Fact[str] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Energy:
    accounting: Fact[str] | None = None
    electricity: Fact[str] | None = None
    cooling: Fact[str] | None = None
    power: Fact[str] | None = None
    notes: tuple[Fact[str], ...] = ()
