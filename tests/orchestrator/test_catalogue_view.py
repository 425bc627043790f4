"""`eurotrain sites` and `sites show`: rows with stable keys, and tables that hide nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clusters.machine import Catalogue
from orchestrator.cli import main
from tests.clusters.examplar import write_examplar

Run = Callable[..., Result]

SITES = """
[lumi]
scratch = "/scratch/p"
account = "project_46"
partition = "standard-g"

[leo]
catalogue = "leonardo"
scratch = "/x"
partition = "boost_usr_prod"
qos = "normal"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path))
    (tmp_path / "sites.toml").write_text(SITES)
    return tmp_path


@pytest.fixture
def run(home: Path) -> Run:
    def ran(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        return result

    return ran


def told(result: Result) -> Any:
    return json.loads(result.stdout)


def test_all_sites_and_machines_are_listed(run: Run) -> None:
    rows = told(run("sites", "--json"))
    assert [row["machine"] for row in rows["machines"]] == Catalogue().names()
    lumi, leonardo = rows["sites"]
    assert lumi == {
        "site": "lumi", "machine": "lumi", "description": "LUMI-G", "account": "project_46", "host": "",
        "scratch": "/scratch/p", "partition": "standard-g", "qos": "", "unit": "GPU-hour",
        "units_per_rank_hour": 0.5, "max_ranks": 8192, "max_time_limit_seconds": 172800.0,
        "rank_memory_bytes": 64 * 10**9, "rank_flops": 191.5e12, "efficiency": 0.366, "lacks": [],
    }  # fmt: skip
    assert (leonardo["rank_flops"], leonardo["max_ranks"]) == (None, 256)
    assert [line.rpartition("; ")[2] for line in leonardo["lacks"]] == ["set rank_tflops", "set efficiency"]


def test_a_machine_is_listed_with_what_is_known(run: Run) -> None:
    rows = {row["machine"]: row for row in told(run("sites", "--json"))["machines"]}
    assert rows["discoverer-plus"]["units"] == ["GPU-hour", "billing-hour"]
    assert (rows["jupiter"]["per_node"], rows["jupiter"]["nodes"]) == (4, 5884)
    assert rows["lumi"]["conflicts"] >= 7
    assert rows["fortytwo"]["facts"] == 0
    assert rows["daedalus"]["state"] == "planned"


def test_the_list_for_people(run: Run, home: Path) -> None:
    shown = run("sites").output
    assert "standard-g" in shown
    assert "leo in sites.toml: the catalogue does not tell a rank's peak FLOP/s" in shown
    (home / "sites.toml").unlink()
    alone = run("sites").output
    assert f"{home / 'sites.toml'} names no site of yours yet" in alone
    assert "discoverer-plus" in alone


def test_every_fact_is_shown_with_its_source_date_and_status(run: Run) -> None:
    shown = told(run("sites", "show", "lumi", "--json"))
    machine = Catalogue().load("lumi")
    assert [row["fact"] for row in shown["facts"]] == [path for path, _ in machine.facts()]
    facts = {row["fact"]: row for row in shown["facts"]}
    assert facts["partition.standard-g.max_time"] == {
        "fact": "partition.standard-g.max_time", "value": "2-00:00:00", "status": "seen", "source": "part",
        "date": "2024-10-15", "read": "2026-11-21", "note": "", "conflicts": [],
    }  # fmt: skip
    assert facts["device.power_w"]["status"] == "derived"
    assert facts["device.power_w"]["note"] == "560 W per module of 2 GCDs"
    sources = {row["source"]: row for row in shown["sources"]}
    assert {row["source"] for row in shown["facts"]} == set(sources)
    assert sources["bill"]["at"].endswith("docs/runjobs/lumi_env/billing.md")


def test_conflicts_are_shown_to_people(run: Run) -> None:
    shown = run("sites", "show", "lumi").output
    assert "conflict: 383, the module's figure" in shown
    assert "undated" in shown


def test_brackets_are_shown_and_are_no_markup(run: Run, home: Path) -> None:
    write_examplar(home / "catalogue", 'NCCL_NET = "IB"', 'NCCL_NET = "[red]IB"')
    assert "[red]IB" in run("sites", "show", "examplar").output


def test_a_sites_name_leads_to_its_machine(run: Run) -> None:
    assert told(run("sites", "show", "leo", "--json"))["machine"] == "leonardo"


def test_a_machine_of_the_operators_own(run: Run, home: Path) -> None:
    path = write_examplar(home / "catalogue")
    assert told(run("sites", "show", "examplar", "--json"))["file"] == str(path)
    assert "examplar" in [row["machine"] for row in told(run("sites", "--json"))["machines"]]


def test_no_such_machine(run: Run) -> None:
    result = run("sites", "show", "lummi", code=2)
    assert "unknown machine or site 'lummi': did you mean 'lumi'?" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_mistake_in_an_own_file_is_one_line(run: Run, home: Path) -> None:
    write_examplar(home / "catalogue", "max_nodes = 10", "max_node = 10")
    result = run("sites", code=2)
    assert "examplar.toml: [partition.wide]: unknown 'max_node'; did you mean 'max_nodes'?" in result.stderr
