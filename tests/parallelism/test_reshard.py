"""A checkpoint cut for another layout is, piece by piece, what that layout's ranks would have written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoints.manifest import load
from clusters.segment import EXIT_COMPLETED, Segment
from orchestrator.cli import main
from parallelism import rank
from parallelism.layout import Layout
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import TRAINING, contents, saved, segment, told, written

pytestmark = pytest.mark.ranks

TP2PP2 = Layout(tp=2, pp=2)
ZERO = Layout(dp=2, pp=2, vpp=2, distributed_optimizer=True)


def train(ranks: Ranks, scratch: Path, layout: Layout, steps: int = 2) -> tuple[Segment, Path]:
    """A training that ended after so many steps, and its only checkpoint."""
    training = replace(TRAINING, steps=steps)
    given = segment(scratch, layout, training=training, every=100)
    codes = ranks.run(layout.ranks, partial(rank.main, written(given).root))
    assert codes == [EXIT_COMPLETED] * layout.ranks
    (checkpoint,) = saved(given)
    return given, checkpoint


def reshard(*words: object, code: int = 0) -> dict[str, object]:
    done = CliRunner().invoke(main, ["checkpoint", "reshard", *map(str, words), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code == 0 else {"stderr": done.stderr}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child of the command finds the rooms where this process has them."""
    monkeypatch.setenv("PYTHONPATH", str(Path(rank.__file__).parents[1]))


def test_pieces_are_those_that_the_ranks_would_write(ranks: Ranks, tmp_path: Path) -> None:
    """There and back: other pieces with the same bits, then the very same pieces."""
    _, source = train(ranks, tmp_path / "a", TP2PP2)
    words = ["--pp", 2, "--vpp", 2, "--dp", 2, "--distributed-optimizer"]
    there = reshard(source, tmp_path / "there", *words)
    _, ranks_own = train(ranks, tmp_path / "b", ZERO)
    assert there["layout"] == asdict(ZERO)
    assert there["read_bytes"] == sum(piece.bytes for piece in load(source).pieces)
    made = Path(str(there["path"]))
    shapes = [{key for key in contents(path) if "random" not in key[0]} for path in (made, ranks_own)]
    assert shapes[0] == shapes[1]
    assert load(made).files.keys() == load(ranks_own).files.keys()
    back = reshard(made, tmp_path / "back", "--tp", 2, "--pp", 2)
    assert contents(Path(str(back["path"]))) == contents(source)
    assert load(Path(str(back["path"]))).facts["resharded"]["layout"] == asdict(TP2PP2)


def test_a_training_goes_on_from_it(ranks: Ranks, tmp_path: Path) -> None:
    given, source = train(ranks, tmp_path / "a", TP2PP2)
    longer = replace(given, training=replace(given.training, steps=4))
    expected = ranks.run(4, partial(rank.main, written(replace(longer, key="on")).root))
    assert expected == [EXIT_COMPLETED] * 4
    losses = [event["loss"] for event in told(written(replace(longer, key="on")), "step")]
    other = tmp_path / "b"
    moved = segment(other, ZERO, training=longer.training, every=100)
    directory = other / "checkpoints" / moved.run / moved.site
    reshard(source, directory, "--pp", 2, "--vpp", 2, "--dp", 2, "--distributed-optimizer")
    assert ranks.run(4, partial(rank.main, written(moved).root)) == [EXIT_COMPLETED] * 4
    assert [event["loss"] for event in told(written(moved), "step")] == pytest.approx(losses, abs=2e-6)


def test_what_cannot_be_is_refused_in_one_line(ranks: Ranks, tmp_path: Path) -> None:
    _, source = train(ranks, tmp_path, Layout(), steps=1)
    refused = reshard(source, tmp_path / "new", "--tp", 4, code=2)
    assert "layout.tp = 4: must divide model.query_groups = 2" in str(refused["stderr"])
    file = source / "writer-00000.bin"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    refused = reshard(source, tmp_path / "new", "--tp", 2, code=2)
    assert "writer-00000.bin: bytes 0 to" in str(refused["stderr"])
    assert not list((tmp_path / "new").glob("*/manifest.json"))


def test_no_torch_is_needed() -> None:
    code = "import parallelism.reshard, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
