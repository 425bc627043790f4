"""What the commands ask of the children, and how a run goes on from what they made."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import ModelShape
from orchestrator.interop import read_model, start_tables
from orchestrator.models import preset

SMALL = ModelShape(2, 8, 12, 4, 2, 10)


def test_a_model_by_preset_or_by_file(tmp_path: Path) -> None:
    assert read_model("llama-7m") == ModelShape(**preset("llama-7m"))
    (tmp_path / "run.toml").write_text('[model]\npreset = "llama-7m"\nqkv_bias = true\n[data]\nx = 1')
    assert read_model(str(tmp_path / "run.toml")) == ModelShape(**preset("llama-7m"), qkv_bias=True)
    (tmp_path / "bare.toml").write_text(
        "layers = 2\nhidden_size = 8\nffn_hidden_size = 12\nattention_heads = 4\nquery_groups = 2\n"
        "vocabulary_size = 10"
    )
    assert read_model(str(tmp_path / "bare.toml")) == SMALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "x.toml: cannot be read: "),
        ("[model]\npreset = 'lama-7m'", "unknown preset 'lama-7m': did you mean"),
        ("[model]\npreset = 'llama-7m'\nlayerz = 2", "x.toml: model.layerz: "),
        ("[model]\npreset = 'llama-7m'\nlayers = '2'", "x.toml: model.layers: "),
        ("layers = 2", "x.toml: model.hidden_size: "),
    ],
)
def test_bad_models_are_one_line(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_model("x.toml")
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"y\.toml: cannot be read"):
        read_model("y.toml")


shapes = st.builds(
    ModelShape,
    tied_embeddings=st.booleans(),
    kv_channels=st.none() | st.integers(2, 64),
    sliding_window=st.none() | st.integers(1, 64),
    rope_scaling=st.sampled_from(["none", "llama3"]),
    rope_factor=st.floats(1, 64),
    norm_epsilon=st.floats(1e-9, 1e-2),
)


@given(shapes, st.text(st.characters(exclude_categories=["C"]), max_size=8))
def test_the_tables_say_all_of_it(shape: ModelShape, name: str) -> None:
    told = start_tables(name, {"model": asdict(shape), "sha256": "0" * 64})
    table = tomllib.loads(told)
    assert ModelShape(**table["model"]) == shape
    assert table["start"] == {"checkpoint": f"models/{name}", "sha256": "0" * 64}
