"""Machines: one file each, read strictly; folders of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters.machine import SHIPPED, Catalogue, load_machine
from tests.clusters.examplar import write_examplar


def test_a_machine_is_its_file(tmp_path: Path) -> None:
    machine = load_machine(write_examplar(tmp_path))
    assert (machine.name, machine.title, machine.operator) == ("examplar", "Examplar", "Nobody, Nowhere")
    assert list(machine.partition) == ["wide", "shared", "new"]
    assert machine.environment["NCCL_PROTO"].source.at == "https://example.org/note"
    assert {fact.source.key for _, fact in machine.facts()} == {"guide", "note"}
    conflicts = {path: fact.conflicts for path, fact in machine.facts() if fact.conflicts}
    assert conflicts == {"partition.shared.max_time": ("the note: 12 h",)}


def test_a_partition_may_name_its_own_formula(tmp_path: Path) -> None:
    machine = load_machine(write_examplar(tmp_path))
    assert machine.charges("shared")["core-hour"].rule.value == "slices"
    assert machine.charges("wide")["core-hour"].rule.value == "nodes"
    assert machine.charges(None)["core-hour"].rule.value == "nodes"


GROUPS = "known: title, operator, read, sources, state, scheduler, partition"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("[node]", "[nodes]", f"unknown 'nodes'; did you mean 'node'? {GROUPS}"),
        ('title = "Examplar"\n', "", "lacks title, a text"),
        ('operator = "Nobody, Nowhere"', "operator = 3", "lacks operator, a text"),
        ("[node]", "[node", "not TOML"),
        ("max_nodes = 10", "max_node = 10", "[partition.wide]: unknown 'max_node'; did you mean 'max_nodes'"),
        ("max_gpus = 1", "max_gpu = 1", "[qos.one]: unknown 'max_gpu'; did you mean 'max_gpus'?"),
        ("memory_gib = 80", "memory_gig = 80", "[partition.new.device]: unknown 'memory_gig'; did you mean"),
        ('rule = "nodes"', 'rule = "node"', "[charge.whole] rule: unknown 'node'; did you mean 'nodes'?"),
        ("per_node_hour = 32", "per_slice_hour = 32", "rule 'nodes': unknown 'per_slice_hour'"),
        ('unit = "core-hour"\n', "", "[charge.whole] lacks unit"),
        ('["shared"]', '["shard"]', "charge.parts.partitions: unknown 'shard'; did you mean 'shared'?"),
        ("note = {at", 'other = {at = "x"}\nnote = {at', "[sources] other is the source of no fact"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"examplar\.toml") as caught:
        load_machine(write_examplar(tmp_path, old, new))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_operators_folder_comes_before_the_shipped_one(tmp_path: Path) -> None:
    write_examplar(tmp_path, 'title = "Examplar"', 'title = "Mine"').rename(tmp_path / "lumi.toml")
    catalogue = Catalogue((tmp_path, SHIPPED))
    assert catalogue.names() == Catalogue().names()
    assert catalogue.load("lumi").title == "Mine"
    assert catalogue.load("leonardo").title == Catalogue().load("leonardo").title
    assert Catalogue((tmp_path / "none", tmp_path)).names() == ["lumi"]


def test_no_such_machine() -> None:
    with pytest.raises(ValueError, match="catalogue: unknown 'lummi'; did you mean 'lumi'"):
        Catalogue().load("lummi")
