"""`eurotrain checkpoint list | show | verify | prune`: of a directory, an attempt, a run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from checkpoints.attempts import begin, commit
from checkpoints.manifest import MANIFEST
from checkpoints.reader import Shard
from checkpoints.store import write_shards
from clusters.events import CHECKPOINT_SAVED
from clusters.paths import SitePaths
from orchestrator import kinds
from orchestrator.cli import main
from orchestrator.desk import Desk
from orchestrator.progress import bytes_done
from tests.orchestrator.story import A, B, plan

RUN = "trial-abc234"
LAYOUT = {"tp": 2, "pp": 1, "dp": 1, "cp": 1, "ep": 1, "vpp": 1}

Run = Callable[..., Result]


def save(directory: Path, step: int, kind: str = "checkpoint") -> Path:
    attempt = begin(directory, f"step-{step:08d}")
    for writer in range(2):
        rows = torch.full((4, 3), float(step))
        write_shards(attempt, writer, [Shard("weight", (8, 3), (4 * writer, 0), rows)])
    commit(attempt, 2, kind, {"step": step, "tokens": step * 1000, "layout": LAYOUT, "outer": None})
    return attempt


def damage(attempt: Path) -> None:
    """Turn a bit of the second writer's tensor."""
    file = attempt / "writer-00001.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


def told(result: Result) -> Any:
    return json.loads(result.stdout)


# ---- of a directory


def test_a_directory_is_listed_newest_first_with_what_is_wrong(run: Run, tmp_path: Path) -> None:
    old, new, torn = save(tmp_path, 5), save(tmp_path, 10), save(tmp_path, 15)
    (torn / "writer-00000.bin").write_bytes(b"")
    never = begin(tmp_path, "step-00000020")
    rows = told(run("list", tmp_path, "--json"))
    assert [(row["path"], row["state"]) for row in rows] == [
        (str(new), "intact"),
        (str(old), "intact"),
        (str(torn), "damaged"),
        (str(never), "uncommitted"),
    ]
    assert rows[0] == {
        "site": None, "path": str(new), "name": "step-00000010.0001", "state": "intact", "reason": None,
        "step": 10, "tokens": 10_000, "layout": LAYOUT, "bytes": 96, "files": 2,
    }  # fmt: skip
    assert rows[2]["reason"] == "writer-00000.bin has 0 bytes, not 48"
    assert {frozenset(row) for row in rows} == {frozenset(rows[0])}
    drawn = run("list", tmp_path).output
    assert "TP2" in drawn
    assert "10k" in drawn or "10000" in drawn


def test_one_attempt_is_listed_alone(run: Run, tmp_path: Path) -> None:
    save(tmp_path, 5)
    rows = told(run("list", save(tmp_path, 10), "--json"))
    assert [row["step"] for row in rows] == [10]


def test_show_takes_the_newest_that_is_intact(run: Run, tmp_path: Path) -> None:
    save(tmp_path, 5)
    new = save(tmp_path, 10)
    facts = told(run("show", tmp_path, "--json"))
    assert facts == told(run("show", new, "--json"))
    assert facts["path"] == str(new)
    assert facts["tensors"] == [
        {"name": "weight", "dtype": "float32", "shape": [8, 3], "pieces": 2, "bytes": 96}
    ]
    assert facts["facts"]["step"] == 10
    assert "8 x 3" in run("show", new, "--tensors").output
    assert "8 x 3" not in run("show", new).output


def test_verify_names_the_damaged_file_and_bytes(run: Run, tmp_path: Path) -> None:
    whole, broken = save(tmp_path, 5), save(tmp_path, 10)
    assert told(run("verify", tmp_path, "--json")) == [
        {"path": str(path), "bytes": 96, "damage": []} for path in (broken, whole)
    ]
    damage(broken)
    rows = told(run("verify", tmp_path, "--json", code=1))
    assert [row["path"] for row in rows if row["damage"]] == [str(broken)]
    assert "writer-00001.bin: bytes 0 to 48 (weight) have crc32c" in rows[0]["damage"][0]
    assert "bytes 0 to 48" in run("verify", broken, code=1).output
    run("verify", whole)


def test_every_damage_is_told_not_the_first_alone(run: Run, tmp_path: Path) -> None:
    attempt = begin(tmp_path, "step-00000001")
    write_shards(attempt, 0, [Shard(n, (4096,), (0,), torch.ones(4096)) for n in "abc"])
    commit(attempt, 1, "checkpoint", {"step": 1})
    file = attempt / "writer-00000.bin"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    data[2 * 4096 * 4 + 7] ^= 1
    file.write_bytes(data)
    (row,) = told(run("verify", attempt, "--json", code=1))
    assert ["(a)" in row["damage"][0], "(c)" in row["damage"][1], len(row["damage"])] == [True, True, 2]


def test_a_manifest_that_cannot_be_read_is_damage(run: Run, tmp_path: Path) -> None:
    attempt = save(tmp_path, 5)
    (attempt / MANIFEST).write_text("{}")
    (row,) = told(run("verify", tmp_path, "--json", code=1))
    assert row["damage"] == ["the manifest must have exactly crc32c, facts, files, kind, pieces"]


def test_prune_shows_asks_and_keeps_the_newest(run: Run, tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(1, 6)]
    asked = CliRunner().invoke(main, ["checkpoint", "prune", str(tmp_path), "--keep", "3"], input="n\n")
    assert asked.exit_code == 1
    assert all(str(path) in asked.output for path in made[:2])
    assert all(path.exists() for path in made)
    assert told(run("prune", tmp_path, "--keep", 3, "--yes", "--json")) == [str(made[1]), str(made[0])]
    assert [path.exists() for path in made] == [False, False, True, True, True]
    assert "nothing to delete" in run("prune", tmp_path, "--keep", 3).output
    run("prune", tmp_path, "--keep", 1, "--yes", code=2)


@pytest.mark.parametrize("words", [("list",), ("show",), ("verify",), ("prune", "--yes")])
def test_what_is_no_place_is_refused_in_one_line(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = run(*words, tmp_path / "nowhere", code=2)
    assert "nowhere" in result.stderr


def test_bad_requests(run: Run, tmp_path: Path) -> None:
    assert "no committed checkpoint" in run("show", tmp_path, code=2).stderr
    assert "no committed checkpoint" in run("verify", tmp_path, code=2).stderr
    attempt = begin(tmp_path, "step-00000001")
    assert "was never committed" in run("show", attempt, code=2).stderr
    assert "is one checkpoint" in run("prune", attempt, code=2).stderr
    assert "--site x" in run("list", tmp_path, "--site", "x", code=2).stderr


def test_a_directory_is_examined_without_torch(tmp_path: Path) -> None:
    """On a login node."""
    save(tmp_path, 5)
    code = (
        "import sys; from orchestrator import checkpoints_view as v; from pathlib import Path\n"
        f"p = {str(tmp_path)!r}; v.listing(p, None); v.shown(p, None)\n"
        "v.verified([Path(p) / 'step-00000005.0001'], print); sys.exit('torch' in sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


# ---- of a run


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A run at a site whose files are here and at one behind ssh, each with a checkpoint."""
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EUROTRAIN_DATABASE", raising=False)
    desk = Desk.open()
    row = '[{}]\ncatalogue = "local"\nscratch = "{}"\naccount = "acc"\n{}\n'
    scratch = tmp_path / "scratch"
    desk.home.sites.write_text(row.format(A, scratch, "") + row.format(B, "/far", 'host = "far"'))
    desk.store.record(RUN, kinds.RUN_CREATED, plan=plan())
    save(SitePaths(scratch).checkpoints(RUN, A), 5)
    lines = [
        {"offset": step - 5, "time": time.time(), "kind": CHECKPOINT_SAVED, "step": step,
         "path": f"/far/step-{step:08d}.0001", "bytes": 7, "seconds": 1.0}
        for step in (5, 10)
    ]  # fmt: skip
    desk.store.ingest(RUN, B, f"{RUN}.{B}.0000", {"ranks": {"lines": lines, "offset": 20}})
    yield desk
    desk.store.close()


@pytest.mark.usefixtures("desk")
def test_a_run_is_listed_site_by_site(run: Run) -> None:
    rows = told(run("list", RUN, "--json"))
    assert [(row["site"], row["state"], row["step"]) for row in rows] == [
        (A, "intact", 5),
        (B, "reported", 10),
        (B, "reported", 5),
    ]
    assert [row["site"] for row in told(run("list", RUN, "--site", A, "--json"))] == [A]
    assert "told by a remote site" in run("list", RUN).output


@pytest.mark.usefixtures("desk")
def test_files_of_a_run_are_read_where_they_are_here(run: Run) -> None:
    assert [row["damage"] for row in told(run("verify", RUN, "--json"))] == [[]]
    assert told(run("show", RUN, "--site", A, "--json"))["facts"]["step"] == 5
    assert "its files are not on this machine" in run("verify", RUN, "--site", B, code=2).stderr
    assert f"its sites: {A}, {B}" in run("list", RUN, "--site", "x", code=2).stderr
    assert "did you mean" in run("list", "trial-abc235", code=2).stderr


# ---- progress


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with bytes_done("verifying", 100) as was_read:
        was_read(50)
    assert capsys.readouterr() == ("", "")


def test_progress_moves_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with bytes_done("verifying", 100) as was_read:
        was_read(50)
    assert "verifying" in capsys.readouterr().err
