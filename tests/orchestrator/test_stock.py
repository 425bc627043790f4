"""What the operator remembers of sites: kept, tolerant of rubbish, never taken for more than it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints.manifest import load
from clusters.segment import Data, Start
from orchestrator import stock as module
from orchestrator.stock import Record, Stock, run_paths, staged_start, start_paths
from tests.checkpoints.samples import checkpoint, weights


def test_a_record_is_kept(tmp_path: Path) -> None:
    stock = Stock(tmp_path / "staged")
    assert stock.load("leonardo") == Record()
    files = {"b": {"size": 2, "sha256": "s", "source": ""}, "a": {"size": 1, "sha256": "t", "source": "/x"}}
    stock.save("leonardo", Record(files))
    assert stock.load("leonardo").contents(["b", "a"]) == [("a", 1, "t"), ("b", 2, "s")]
    assert stock.load("lumi") == Record()


def test_what_was_never_staged_is_named() -> None:
    with pytest.raises(KeyError, match="data/x"):
        Record().contents(["data/x"])


@pytest.mark.parametrize("text", ["", "[]", '{"other": 1}'])
def test_a_record_that_is_none_begins_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "leonardo.json").write_text(text)
    assert Stock(tmp_path).load("leonardo") == Record()


def test_a_file_here_is_read_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"one")
    stock, sources = Stock(tmp_path / "staged"), {"data/x": tmp_path / "x"}
    (first,) = stock.measure(sources)
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", lambda *_: pytest.fail("read again"))
        assert stock.measure(sources) == [first]
        (other,) = stock.measure({"other/name": tmp_path / "x"})
        assert (other.path, other.sha256) == ("other/name", first.sha256)
    (tmp_path / "x").write_bytes(b"two")
    os.utime(tmp_path / "x", ns=(5, 5))
    assert stock.measure(sources)[0].sha256 != first.sha256


def test_a_run_reads_both_files_of_each_prefix() -> None:
    data = Data(("data/a", "data/b"))
    assert run_paths(data, None) == ["data/a.bin", "data/a.idx", "data/b.bin", "data/b.idx"]
    assert run_paths(data, "data/tokenizer.json")[-1] == "data/tokenizer.json"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """An imported model, and another one beside it."""
    attempts = [checkpoint(tmp_path / "models/base", {"w": weights(9)}, step, writers=1) for step in (0, 1)]
    return Start("models/base", load(attempts[1]).sha256)


def test_the_files_of_the_checkpoint_that_a_run_begins_with(tmp_path: Path, start: Start) -> None:
    folder = "models/base/step-00000001.0001"
    assert start_paths(start, tmp_path) == [f"{folder}/manifest.json", f"{folder}/writer-00000.bin"]
    inside = Start(folder, start.sha256)
    assert start_paths(inside, tmp_path) == start_paths(start, tmp_path)
    assert start_paths(None, tmp_path) == []
    with pytest.raises(ValueError, match="has none of sha256 000000000000"):
        start_paths(Start("models/base", "0" * 64), tmp_path)


def test_a_staged_checkpoint_is_known_by_the_hash_of_its_manifest(tmp_path: Path, start: Start) -> None:
    stock = Stock(tmp_path / "staged")
    other = Start("models/base", load(tmp_path / "models/base/step-00000000.0001").sha256)
    files = {
        found.path: {"size": found.size, "sha256": found.sha256, "source": ""}
        for begun in (start, other)
        for found in stock.measure({path: tmp_path / path for path in start_paths(begun, tmp_path)})
    }
    assert sorted(staged_start(start, Record(files))) == sorted(start_paths(start, tmp_path))
    assert sorted(staged_start(other, Record(files))) == sorted(start_paths(other, tmp_path))
    assert staged_start(None, Record()) == []
    with pytest.raises(KeyError, match="models/base"):
        staged_start(start, Record())
    elsewhere = {path.replace("models/base", "models/base-2"): facts for path, facts in files.items()}
    with pytest.raises(KeyError):
        staged_start(start, Record(elsewhere))
