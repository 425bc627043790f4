"""Weights of each family, in and out again, bit for bit; and what is not as it should be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.interop import huggingface
from checkpoints.interop.exporting import main as exporting
from checkpoints.interop.huggingface import Model
from checkpoints.interop.importing import import_weights
from checkpoints.reader import Reader, Shard
from tests.checkpoints.interop.models import FAMILIES, loaded_model, logits, saved_model

MULTIPLE = 128  # 300 tokens become 384 rows


def imported(source: Path, target: Path) -> Reader:
    import_weights(source, target, MULTIPLE)
    return Reader(next(target.glob("*/manifest.json")).parent)


def read(reader: Reader, name: str, *shape: int) -> torch.Tensor:
    tensor = torch.empty(shape)
    reader.read(Shard(name, shape, (0,) * len(shape), tensor))
    return tensor


def exported(*words: object) -> Path:
    assert exporting(["--format=hf", *map(str, words)]) == 0
    return Path(str(words[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_and_out_again(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    original = saved_model(tmp_path / "theirs", family)
    reader = imported(tmp_path / "theirs", tmp_path / "ours")
    reader.verify()
    back = loaded_model(exported(tmp_path / "ours", tmp_path / "back"))
    assert back.config.model_type == family
    mine, theirs = back.state_dict(), original.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    tokens = torch.arange(40).view(2, 20) * 7
    assert torch.equal(logits(back, tokens), logits(original, tokens))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    totals = [line["total"] for line in lines if "total" in line]
    assert sum(line.get("bytes", 0) for line in lines) == sum(totals)
    assert totals[0] == totals[1] == sum(4 * p.numel() for p in original.parameters())


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp32"), (torch.float32, "fp32")]
)
def test_half_precision_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype, precision: str) -> None:
    original = saved_model(tmp_path / "theirs", "llama", dtype)
    facts = imported(tmp_path / "theirs", tmp_path / "ours").facts
    assert facts["precision"] == precision
    name = str(dtype).removeprefix("torch.")
    target = exported(tmp_path / "ours", tmp_path / "back", "--dtype", name)
    weights = load_file(target / "model.safetensors")
    assert weights.keys() == original.state_dict().keys()
    assert all(torch.equal(weights[n], t) and t.dtype == dtype for n, t in original.state_dict().items())


def test_many_files_and_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = saved_model(tmp_path / "theirs", "llama", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    monkeypatch.setattr(huggingface, "CHUNK", 1000)  # seven rows of 32
    monkeypatch.setattr(huggingface, "SHARD", 50_000)
    imported(tmp_path / "theirs", tmp_path / "ours")
    target = exported(tmp_path / "ours", tmp_path / "back")
    sizes = [path.stat().st_size for path in target.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 60_000
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in original.parameters())
    mine = loaded_model(target).state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in original.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_of_no_token_hardly_weigh(tmp_path: Path, family: str) -> None:
    """Those that make logits are the mean of the others: ln(1 + 84 / 300) is the most they add to a loss."""
    original = saved_model(tmp_path / "theirs", family)
    reader = imported(tmp_path / "theirs", tmp_path / "ours")
    table = read(reader, "embedding.word_embeddings.weight", 384, 32)
    if family == "llama":
        assert not table[300:].any()
        table = read(reader, "output_layer.weight", 384, 32)
    real = original.get_output_embeddings().weight.detach()
    assert torch.equal(table[:300], real)
    assert torch.allclose(table[300:], real.mean(dim=0), atol=1e-6)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    more = torch.logsumexp(hidden @ table.T, 1) - torch.logsumexp(hidden @ real.T, 1)
    assert float(more.min()) > 0
    assert float(more.max()) < math.log(1 + 84 / 300)


def test_ours_are_megatrons(tmp_path: Path) -> None:
    theirs = saved_model(tmp_path / "theirs", "llama").state_dict()
    reader = imported(tmp_path / "theirs", tmp_path / "ours")
    fused = read(reader, "decoder.layers.1.self_attention.linear_qkv.weight", 64, 32).view(2, 4, 8, 32)
    q, k, v = (theirs[f"model.layers.1.self_attn.{x}_proj.weight"].view(2, -1, 8, 32) for x in "qkv")
    assert torch.equal(fused, torch.cat([q, k, v], dim=1))
    first = read(reader, "decoder.layers.0.mlp.linear_fc1.weight", 128, 32)
    gate, up = (theirs[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(first, torch.cat([gate, up]))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), "has no tensor model.norm.weight"),
        (lambda w: w.update({NORM: torch.ones(31)}), r"model.norm.weight is \(31,\); by its config \(32,\)"),
        (
            lambda w: w.update({NORM: torch.ones(32, dtype=torch.int8)}),
            "norm.weight is I8 .allowed: F32, BF16",
        ),
        (lambda w: w.update({"extra": torch.ones(1)}), "'extra' belongs to no model of this family"),
        (lambda w: w.update({"lm_head.weight_": w.pop("lm_head.weight")}), "has no tensor lm_head.weight"),
    ],
)
def test_other_tensors_than_the_config_tells_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    saved_model(tmp_path, "llama")
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Model(tmp_path, MULTIPLE)


def test_what_follows_from_the_rest_is_left_out(tmp_path: Path) -> None:
    saved_model(tmp_path / "theirs", "qwen2")
    change_weights(
        tmp_path / "theirs",
        lambda w: w.update({
            "lm_head.weight": w["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        }),
    )  # fmt: skip
    imported(tmp_path / "theirs", tmp_path / "ours")


def header(entries: dict[str, Any], data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header({}, length=1 << 62),
        header({}, length=10**8),
        header({"a": entry(0, 16), "b": entry(8, 16)}),  # overlapping
        header({"a": entry(4, 16)}),  # a hole
        header({"a": entry(0, 32)}),  # beyond the end
        header({"a": entry(0, 16, [1 << 40, 1 << 40])}),
        header({"a": entry(0, 16, [-4])}),
        header({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}),
        header({"a": entry(16, 0, [4])}),
        (8).to_bytes(8, "little") + b"[[[[[[[[",
        b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
    ],
    ids=str,
)
def test_crafted_headers_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    saved_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a whole safetensors file: .+") as refusal:
        Model(tmp_path, MULTIPLE)
    assert "\n" not in str(refusal.value)
