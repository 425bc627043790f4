"""What goes out is whole, named by what it was trained in, or not there at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints.attempts import begin, candidates, commit
from checkpoints.interop.exporting import main, newest
from checkpoints.interop.importing import import_weights
from checkpoints.manifest import MANIFEST, load
from checkpoints.store import write_shards
from tests.checkpoints.interop.models import saved_model


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    saved_model(tmp_path / "theirs", "llama")
    import_weights(tmp_path / "theirs", tmp_path / "ours", 128)
    return tmp_path / "ours"


def test_an_import_is_never_mixed_with_another(tmp_path: Path, ours: Path) -> None:
    with pytest.raises(ValueError, match="has a checkpoint already; name another directory"):
        import_weights(tmp_path / "theirs", ours, 128)
    with pytest.raises(ValueError, match="no such directory"):
        import_weights(tmp_path / "nowhere", tmp_path / "new", 128)
    (attempt,) = candidates(ours)
    (attempt / "manifest.json").unlink()  # killed before it was committed
    import_weights(tmp_path / "theirs", ours, 128)
    assert [path.name for path in candidates(ours)] == ["step-00000000.0002"]


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["--format=hf", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    assert "taken: is there already" in failure(capsys, ours, tmp_path / "taken")
    assert "taken: no committed checkpoint\n" in failure(capsys, tmp_path / "taken", tmp_path / "new")
    attempt = begin(tmp_path / "other", "step-00000001")
    write_shards(attempt, 0, [])
    facts = json.loads((candidates(ours)[0] / "manifest.json").read_text())["facts"]
    commit(attempt, 1, "checkpoint", {**facts, "sequence_length": None})
    assert "does not tell its sequence length: say --positions" in failure(capsys, attempt, tmp_path / "new")
    assert "holds no embedding" in failure(capsys, attempt, tmp_path / "new", "--positions", 64)
    assert not (tmp_path / "new").exists()


def test_damage_is_found_and_leaves_nothing_behind(
    tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (attempt,) = candidates(ours)
    file = attempt / "writer-00000.bin"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    assert "have crc32c" in failure(capsys, attempt, tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_or_the_newest(tmp_path: Path) -> None:
    for step in (3, 20, 7):
        attempt = begin(tmp_path, f"step-{step:08d}")
        write_shards(attempt, 0, [])
        commit(attempt, 1, "checkpoint", {"step": step})
    assert newest(tmp_path).name == "step-00000020.0001"
    assert newest(attempt) == attempt


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_written_as_it_was_trained(
    tmp_path: Path, ours: Path, precision: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (attempt,) = candidates(ours)
    manifest = load(attempt)
    changed = replace(manifest, facts={**manifest.facts, "precision": precision})
    (attempt / MANIFEST).write_text(changed.to_json())
    assert main(["--format=hf", str(attempt), str(tmp_path / "out"), "--positions", "77"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["max_position_embeddings"]) == (dtype, 77)
