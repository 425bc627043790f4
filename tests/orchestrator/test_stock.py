"""What the operator remembers of sites: kept, tolerant of rubbish, never taken for more than it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clusters.segment import Data
from orchestrator import stock as module
from orchestrator.stock import Record, Stock, run_paths


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
