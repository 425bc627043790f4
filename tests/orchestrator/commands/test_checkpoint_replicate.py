"""`eurotrain checkpoint replicate`, as an operator types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main
from tests.checkpoints.samples import checkpoint, files, flip, weights

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path / "home"))

    def ran(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["checkpoint", "replicate", *map(str, words)])
        assert result.exit_code == code, result.output
        return result

    return ran


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "here", {f"t{n}": weights(5000, n) for n in range(6)})


def test_a_directory_s_newest_is_copied_and_told_of(run: Run, source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    told = json.loads(run(source.parent, there, "--json").stdout)
    assert told["path"] == str(there / source.name)
    assert files(there / source.name) == files(source)
    assert (told["sent"], told["already"]) == (told["bytes"], False)
    again = run(source, there)
    assert "is there already, and every byte of it is right" in again.output


def test_a_limit_is_kept(run: Run, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "large", {f"t{n}": weights(20_000, n) for n in range(6)})
    told = json.loads(
        run(source, tmp_path / "there", "--bwlimit", "400kB/s", "--streams", 3, "--json").stdout
    )
    assert told["seconds"] >= (480_000 - 262_144) / 400_000  # the bucket is full at the beginning
    assert told["links_lost"] == 0


@pytest.mark.parametrize("words", [["--bwlimit", "fast"], ["--streams", "0"], ["--compress", "gzip"]])
def test_bad_options_are_bad_input(run: Run, source: Path, tmp_path: Path, words: list[str]) -> None:
    assert words[1] in run(source, tmp_path / "there", *words, code=2).output
    assert not (tmp_path / "there").exists()


def test_a_damaged_source_is_one_line_and_nothing_counts(run: Run, source: Path, tmp_path: Path) -> None:
    flip(source / "writer-00001.bin", 5)
    told = run(source, tmp_path / "there", code=2).output
    assert told.count("\n") == 1
    assert f"{source}: writer-00001.bin: bytes 0 to 20000 have crc32c" in told


def test_what_is_neither_place_nor_run_is_bad_input(run: Run, tmp_path: Path) -> None:
    assert "neither a directory nor a run" in run(tmp_path / "absent", tmp_path / "there", code=2).output
