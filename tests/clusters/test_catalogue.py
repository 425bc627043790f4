"""The shipped catalogue: every fact sourced and dated, key figures as they were read, short files; a new site
costs one file and no code."""

from __future__ import annotations

import re
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from clusters.machine import SHIPPED, Catalogue, Machine
from clusters.site import load_sites
from orchestrator.ledger import Ledger
from orchestrator.plan import make_plan
from orchestrator.spec import parse_run
from orchestrator.store import Store
from tests.clusters.examplar import write_examplar

MACHINES = [
    "alice-recoque", "alps", "arrhenius", "daedalus", "deucalion", "discoverer", "discoverer-plus",
    "fortytwo", "horeka", "jupiter", "juwels-booster", "karolina", "leonardo", "local", "lumi",
    "marenostrum5", "meluxina", "vega",
]  # fmt: skip
RUN_TOML = """
name = "trial"
[model]
preset = "llama-3m"
[data]
prefixes = ["data/x"]
[training]
tokens = "200M"
sequence_length = 128
global_batch = 16
micro_batch = 1
learning_rate = 1e-3
[checkpoint]
every_steps = 8
[[islands]]
site = "there"
allocation = "grant"
tp = 2
dp = 4
time_limit = "12h"
"""

# Copied by hand from what was read on 2026-11-21: a slip of an editor shows here.
FIGURES: dict[str, dict[str, Any]] = {
    "alps": {
        "partition.clariden-normal.max_time": "12:00:00",
        "partition.daint-normal.max_time": "1-00:00:00",
        "node.cores": 288,
        "device.memory_gb": 96,
        "charge.whole-nodes.per_node_hour": 1,
        "network.compute_outbound": True,
        "login.certificate_hours": 24,
        "filesystem.iopsstor.purge_days": 14,
    },
    "deucalion": {
        "partition.normal-a100-40.max_nodes": 4,
        "partition.normal-a100-80.device.memory_gb": 80,
        "partition.dev-a100-40.max_time": "04:00:00",
        "charge.gpus.cores_per_slice": 32,
        "filesystem.home.inodes": 25_000,
        "network.compute_outbound": False,
    },
    "discoverer": {"node.count": 1128},
    "discoverer-plus": {
        "qos.account.max_time": "04:00:00",
        "qos.account.max_gpus": 16,
        "charge.billing.per_memory_gib_hour": 0.25,
        "device.per_node": 8,
        "filesystem.scratch.purge_days": 61,
        "login.hosts": ["login-plus.discoverer.bg"],
    },
    "horeka": {
        "partition.accelerated.node.slurm_memory_mib": 501_600,
        "partition.accelerated-h100.max_time": "2-00:00:00",
    },
    "jupiter": {
        "partition.booster.nodes": 5688,
        "partition.booster.max_time": "12:00:00",
        "device.per_node": 4,
        "device.peak_tflops": 989.4,
        "charge.whole-nodes.per_node_hour": 288,
        "network.compute_outbound": False,
        "filesystem.fscratch.purge_days": 30,
        "environment.NCCL_IB_TIMEOUT": "18",
    },
    "juwels-booster": {"node.count": 936, "charge.whole-nodes.per_node_hour": 48, "device.memory_gb": 40},
    "karolina": {
        "partition.qgpu.max_time": "2-00:00:00",
        "partition.qgpu_free.max_time": "18:00:00",
        "node.count": 72,
        "device.per_node": 8,
        "charge.gpus.per_slice_hour": 0.125,
        "network.login_outbound_ports": [22, 80, 443, 873],
        "filesystem.scratch.purge_days": 90,
    },
    "leonardo": {
        "qos.normal.max_nodes": 64,
        "qos.boost_qos_bprod.max_nodes": 256,
        "qos.boost_qos_lprod.max_time": "4-00:00:00",
        "node.slurm_memory_mib": 514_000,
        "device.memory_gb": 64,
        "charge.shares.per_slice_hour": 8,
        "login.certificate_hours": 12,
        "filesystem.scratch.purge_days": 40,
        "network.login_outbound": True,
    },
    "lumi": {
        "partition.standard-g.max_time": "2-00:00:00",
        "partition.standard-g.max_nodes": 1024,
        "partition.small-g.max_time": "3-00:00:00",
        "partition.dev-g.max_nodes": 32,
        "node.slurm_memory_mib": 491_520,
        "device.per_node": 8,
        "device.billed_per_node": 4,
        "device.peak_tflops": 191.5,
        "charge.whole-nodes.per_node_hour": 4,
        "charge.parts.per_slice_hour": 0.5,
        "filesystem.scratch.inodes": 2_000_000,
        "filesystem.flash.purge_days": 30,
        "environment.NCCL_SOCKET_IFNAME": "hsn0,hsn1,hsn2,hsn3",
    },
    "marenostrum5": {
        "qos.acc_ehpc.max_nodes": 100,
        "qos.acc_ehpc.max_time": "3-00:00:00",
        "qos.acc_debug.max_nodes": 8,
        "partition.acc.nodes": 1120,
        "device.memory_gib": 63.29,
        "charge.whole-nodes.per_node_hour": 80,
        "network.login_outbound": False,
        "launch.cpus_per_task": 160,
    },
    "meluxina": {
        "qos.default.max_nodes_percent": 25,
        "qos.long.max_time": "6-00:00:00",
        "partition.gpu.nodes": 200,
        "login.port": 8822,
        "charge.whole-nodes.per_node_hour": 1,
        "filesystem.home.inodes": 100_000,
    },
    "vega": {"node.count": 60, "device.per_node": 4, "node.nic_gbit_s": 100},
    "arrhenius": {"node.count": 382, "device.per_node": 4},
    "alice-recoque": {"device.memory_gb": 432, "device.bandwidth_tb_s": 19.6},
}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Machine:
    return Catalogue().load(request.param)


def test_these_machines_are_shipped() -> None:
    assert Catalogue().names() == MACHINES


def test_every_fact_has_a_dated_source(machine: Machine) -> None:
    for path, fact in machine.facts():
        assert fact.source is machine.sources[fact.source.key], path
        assert fact.source.at, path
        assert date(2026, 11, 21) <= fact.source.read, path
        assert re.fullmatch(r"20\d\d(-\d\d){0,2}", fact.source.date or "2000"), path
        assert fact.status in ("seen", "derived") or machine.name == "local", path


def test_a_file_is_short_and_tells_no_secret(machine: Machine) -> None:
    text = Path(machine.where).read_text()
    assert len(text.splitlines()) <= 170
    assert not re.search(r"[\w.]+@[\w.]+\.(com|org|eu|es|de|it)\b", text), "an address of a person"
    users = re.findall(r"/(?:users|home/users|hpc/home|cscs)/([^/\s\",;]+)", text)
    assert set(users) <= {"<user>", "xxxxxx"}, "a person's directory"


@pytest.mark.parametrize("name", FIGURES)
def test_key_figures(name: str) -> None:
    told = {path: fact.plain for path, fact in Catalogue().load(name).facts()}
    assert {path: told.get(path) for path in FIGURES[name]} == FIGURES[name]


def test_conflicts_are_kept() -> None:
    conflicts = {
        f"{name}.{path}": fact.conflicts
        for name in MACHINES
        for path, fact in Catalogue().load(name).facts()
        if fact.conflicts
    }
    assert conflicts["lumi.device.peak_tflops"] == ("383, the module's figure, in several public files",)
    assert conflicts["leonardo.qos.boost_qos_bprod.min_nodes"] == ("another text: 128",)
    assert "marenostrum5.charge.whole-nodes.rule" in conflicts
    assert "alps.launch.srun" in conflicts
    assert len(conflicts) >= 20


def test_what_nobody_knows_is_absent() -> None:
    """Peaks and rates that were known from memory alone must not have slipped in."""
    leonardo, mn5 = Catalogue().load("leonardo"), Catalogue().load("marenostrum5")
    assert leonardo.device.peak_tflops is leonardo.node.local_disk is mn5.device.peak_tflops is None
    assert mn5.node.nic_gbit_s is Catalogue().load("meluxina").network.compute_outbound is None
    assert Catalogue().load("vega").charge == Catalogue().load("horeka").charge == {}
    assert list(Catalogue().load("fortytwo").facts()) == []


def test_variables_can_be_exported(machine: Machine) -> None:
    for name, fact in machine.environment.items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", name)
        assert "\n" not in fact.value
        assert "'" not in fact.value


def test_masks_and_numa_nodes_fit_the_node(machine: Machine) -> None:
    """One mask per device, none overlaps, and each has as many CPUs as a task gets."""
    bind, tasks = machine.launch.cpu_bind, machine.launch.tasks_per_node
    if bind and bind.value.startswith("mask_cpu:"):
        masks = [int(mask, 16) for mask in bind.value.removeprefix("mask_cpu:").split(",")]
        assert tasks is not None
        assert machine.launch.cpus_per_task is not None
        assert machine.node.cores is not None
        assert len(masks) == tasks.value
        assert all(mask.bit_count() == machine.launch.cpus_per_task.value for mask in masks)
        assert sum(masks).bit_count() == sum(mask.bit_count() for mask in masks) <= machine.node.cores.value
    if machine.device.numa and machine.device.per_node:
        assert len(machine.device.numa.value) == machine.device.per_node.value


def test_a_full_node_is_billed_alike_by_every_formula_of_a_machine(machine: Machine, tmp_path: Path) -> None:
    """Where a machine bills whole nodes in one partition and shares in another, full nodes cost the same."""
    sites = tmp_path / "sites.toml"
    rates: dict[str, set[float]] = {}
    for partition in machine.partition:
        sites.write_text(f'[{machine.name}]\nscratch = "/x"\npartition = "{partition}"\n')
        site = load_sites(sites)[machine.name]
        charges = machine.charges(partition)
        if len(charges) == 1 and site.device.per_node:
            rate = site.units_per_hour(site.device.per_node.value)
            rates.setdefault(next(iter(charges)), set()).add(rate)
    assert all(len(each) == 1 for each in rates.values()), rates


def test_a_new_site_costs_one_file_and_no_code(tmp_path: Path) -> None:
    """Its file in the operator's catalogue, its table in sites.toml, and a run can be planned there."""
    write_examplar(tmp_path / "catalogue")
    sites = tmp_path / "sites.toml"
    sites.write_text(
        '[there]\ncatalogue = "examplar"\nscratch = "/x"\npartition = "wide"\nefficiency = 0.25\n'
    )
    store = Store(f"sqlite:///{tmp_path}/log.db")
    try:
        ledger = Ledger(store)
        ledger.grant("grant", 1_000_000_000, "core-hour", "award")
        plan = make_plan(parse_run(RUN_TOML, "run.toml"), load_sites(sites), ledger)
    finally:
        store.close()
    (island,) = plan.islands
    assert (island.ranks, island.unit, island.units_per_hour) == (8, "core-hour", 64)  # two whole nodes
    assert island.reserved == 12 * 64 * 10**6
    seconds = Fraction(island.flops) / (8 * Fraction("100.5e12") / 4)
    assert island.estimated_seconds == pytest.approx(float(seconds))


def test_a_new_site_too_small_for_the_run_is_refused_by_its_own_limits(tmp_path: Path) -> None:
    write_examplar(tmp_path / "catalogue", "max_nodes = 10", "max_nodes = 1")
    sites = tmp_path / "sites.toml"
    sites.write_text('[there]\ncatalogue = "examplar"\nscratch = "/x"\npartition = "wide"\nqos = "one"\n')
    store = Store(f"sqlite:///{tmp_path}/log.db")
    try:
        with pytest.raises(ValueError, match="needs 8 ranks; there has 1") as caught:
            make_plan(parse_run(RUN_TOML, "run.toml"), load_sites(sites), Ledger(store))
    finally:
        store.close()
    assert "time_limit is 12h; there allows 1h" in str(caught.value)


def test_the_shipped_folder_holds_nothing_else() -> None:
    assert {path.suffix for path in SHIPPED.iterdir() if path.is_file()} == {".toml"}
