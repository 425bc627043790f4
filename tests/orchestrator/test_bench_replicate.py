"""The rows of `eurotrain bench replicate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from tests.checkpoints.samples import checkpoint, weights


def test_ratios_are_taken_pair_by_pair_and_told_with_their_spread(tmp_path: Path) -> None:
    pytest.importorskip("zipnn")
    checkpoint(tmp_path, {"w": weights(50_000)})
    done = CliRunner().invoke(main, ["bench", "replicate", str(tmp_path), "-n", "2", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows[:3]] == [
        "lossless ratio: weights, float32", "packing: weights, float32", "unpacking: weights, float32",
    ]  # fmt: skip
    assert {row["peer_name"] for row in rows} == {"ZipNN"}
    assert rows[0]["ratio"]["median"] == pytest.approx(1.0, abs=0.02)
    assert rows[0]["repetitions"] == 2


def test_no_checkpoint_is_bad_input(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "replicate", str(tmp_path)])
    assert done.exit_code == 2
    assert "neither a committed checkpoint" in done.output
