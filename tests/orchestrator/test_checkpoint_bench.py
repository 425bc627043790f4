"""Ratios say what they claim, and the bench itself runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator import checkpoint_bench
from orchestrator.checkpoint_bench import RATIOS, report
from orchestrator.cli import main

ROW = {
    "bytes": 4e9, "memcpy": 0.5, "stall": 0.75, "dcp_stall": 2.0, "ours": 2.0, "direct": 1.5, "dcp": 8.0,
    "dcp_async": 6.0, "safetensors": 4.0, "slowdown": 1.04, "checksums": 0.1, "load_warm": 1.0,
    "reshard_warm": 1.25, "load_cold": 2.0, "reshard_cold": 3.0, "files": 5.0,
    **{f"{arm}_cpu": 0.5 for arm in ("ours", "dcp", "dcp_async", "safetensors", "direct")},
}  # fmt: skip


def test_every_ratio_is_the_one_that_its_name_says() -> None:
    ratios = {name: found["median"] for name, found in report([ROW, ROW])["ratios"].items()}
    assert ratios == pytest.approx({
        "stall_over_memcpy": 1.5, "dcp_stall_over_memcpy": 4.0, "write_over_direct": 0.75,
        "write_over_dcp": 3.0, "write_over_safetensors": 2.0, "caller_slowdown": 0.04, "verify_share": 0.1,
        "reshard_over_load": 1.25, "reshard_over_load_cold": 1.5, "files_per_node": 5.0,
    })  # fmt: skip


def test_the_first_repetition_is_apart_and_the_others_have_a_spread() -> None:
    rows = [{**ROW, "stall": stall} for stall in (50.0, 0.5, 1.5, 1.0)]
    facts = report(rows)
    assert facts["ratios"]["stall_over_memcpy"] == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert facts["first"]["stall_over_memcpy"] == 100.0
    assert facts["repetitions"] == 3
    assert facts["gigabytes_per_second"]["ours"]["median"] == 2.0


def test_the_table_has_every_ratio_and_its_aim() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=None)
    with console.capture() as captured:
        console.print(checkpoint_bench.table(report([ROW, ROW])))
    for ratio in RATIOS:
        assert ratio.name in captured.get()
        assert ratio.aim in captured.get()


@pytest.mark.ranks
def test_it_runs_and_leaves_nothing(tmp_path: Path) -> None:
    words = ["bench", "checkpoint", "-n", "1", "--size", "4MiB", "--directory", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(facts["ratios"]) == {ratio.name for ratio in RATIOS}
    assert facts["ratios"]["files_per_node"]["median"] == 3, "two writers' files and a manifest"
    assert 7 << 20 < facts["bytes"] <= 8 << 20
    assert all(found["min"] > 0 for found in facts["gigabytes_per_second"].values())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--size", "4kB"], 2, "4000 bytes per rank are too few for 16 matrices"),
        (["--ranks", "3"], 2, "3 ranks cannot share 2048 columns evenly"),
        (["--size", "1000TB"], 1, "MiB are needed"),
    ],
)
@pytest.mark.ranks
def test_what_cannot_be_measured(tmp_path: Path, words: list[str], code: int, reason: str) -> None:
    result = CliRunner().invoke(main, ["bench", "checkpoint", "--directory", str(tmp_path), *words])
    assert (result.exit_code, reason in result.stderr) == (code, True), result.output
