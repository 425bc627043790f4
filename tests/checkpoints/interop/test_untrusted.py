"""Directories that somebody else made: nothing outside of them is opened, nothing too large is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.interop import untrusted
from checkpoints.interop.untrusted import copy_tokenizer, read_json, regular, weight_files


def index(directory: Path, table: Any) -> None:
    (directory / untrusted.INDEX).write_text(json.dumps({"weight_map": table}))


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/../../b.safetensors", "x.bin", ".x.safetensors", 7,
     "a\x00.safetensors", "a\n.safetensors", ["a.safetensors"], None, "A" * 300 + ".safetensors"],
    ids=str,
)  # fmt: skip
def test_an_index_names_plain_files_only(tmp_path: Path, name: Any) -> None:
    (tmp_path / "secret.safetensors").touch()
    place = tmp_path / "model"
    place.mkdir()
    index(place, {"a": name})
    with pytest.raises(ValueError, match="is not a plain name of a weights file"):
        weight_files(place)


@pytest.mark.parametrize("table", [{}, [], None, "x"])
def test_an_index_has_a_table(tmp_path: Path, table: Any) -> None:
    index(tmp_path, table)
    with pytest.raises(ValueError, match="has no weight_map"):
        weight_files(tmp_path)


def test_files_of_an_index_come_once(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    index(tmp_path, {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"})
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    index(tmp_path, {"x": "c.safetensors"})
    with pytest.raises(ValueError, match="no such file"):
        weight_files(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*; no other weights are read"):
        weight_files(tmp_path)


def test_links_stay_inside(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("{}")
    place = tmp_path / "model"
    place.mkdir()
    (place / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ValueError, match="a link that leads out of the directory"):
        copy_tokenizer(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (place / "tokenizer.json").unlink()
    (place / "real.json").write_text("{}")
    (place / "tokenizer.json").symlink_to("real.json")
    assert copy_tokenizer(place, tmp_path / "out") == ["tokenizer.json"]
    (place / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="no such file"):
        regular(place, "loop")


def test_the_cache_of_hugging_face_may_be_named(tmp_path: Path) -> None:
    """Its snapshots are links into blobs beside them."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert read_json(snapshot, "config.json", 100) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b" " * 200_001, "200001 bytes; at most 200000 are read"),
    ],
    ids=["cut", "not UTF-8", "deep", "a list", "long"],
)
def test_json_is_bounded(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path, "config.json", 200_000)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path, "folder", 1)


def test_only_a_tokenizers_files_are_copied(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).write_text("{}")
    for name in ("merges.txt", "tokenization_custom.py", "model.safetensors"):
        (place / name).write_text("x")
    files = ["tokenizer.json", "tokenizer_config.json", "merges.txt"]
    assert copy_tokenizer(place, tmp_path / "out") == files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files)
    (place / "vocab.json").write_text("not json")
    with pytest.raises(ValueError, match=r"vocab\.json: not JSON"):
        copy_tokenizer(place, tmp_path / "out")
