"""GGUF: what is written is what transformers reads, in each family's own order of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checkpoints.interop.exporting import main as exporting
from checkpoints.interop.exporting import newest
from checkpoints.interop.gguf_file import KINDS, File, _permuted, context, rope_factors
from checkpoints.interop.huggingface import Export
from checkpoints.interop.importing import import_weights
from checkpoints.interop.shape import Shape
from checkpoints.reader import Reader
from tests.checkpoints.interop.models import FAMILIES, saved_model

SMALL = Shape(2, 32, 64, 4, 2, 300)


def imported(tmp_path: Path, family: str) -> Path:
    saved_model(tmp_path / "theirs", family)
    import_weights(tmp_path / "theirs", tmp_path / "ours", 128)
    return tmp_path / "ours"


def text(directory: Path, count: int = 200) -> Path:
    """A Megatron text of as many tokens."""
    np.arange(count, dtype=np.uint16).tofile(directory / "text.bin")
    (directory / "text.idx").write_bytes(b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([8]))
    return directory / "text"


def exported(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    words = ("--format=gguf", f"--data={text(tmp_path)}", *words)
    assert exporting([*words, str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1])["result"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.008), ("int4", 0.16)])
def test_transformers_reads_the_same(
    tmp_path: Path, family: str, kind: str, most: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors of a weight are half a step at most: 1/127 or 1/8 of its block's largest, rounding apart."""
    ours = imported(tmp_path, family)
    result = exported(tmp_path, capsys, f"--quantize={kind}")
    assert result["unquantised"] == []
    path = tmp_path / "out" / f"model-{kind}.gguf"
    # transformers takes a head's width from the file for the other families only
    known = {"config": FAMILIES[family]} if family == "qwen3" else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=path.name, **known)
    theirs = loaded.state_dict()
    reader = Reader(newest(ours))
    work = Export(reader, Shape.from_facts(reader.facts), "float32")
    parts = {part.theirs: part for part in work.parts}
    for name, values in File(work, KINDS[kind]).weights(path):
        assert torch.equal(theirs[name], values), name
        exact = work.tensor(parts[name])
        if exact.dim() == 1:
            assert torch.equal(values, exact), name
        else:
            largest = exact.view(-1, 32).abs().amax(1, keepdim=True)
            error = ((values - exact).view(-1, 32).abs() / largest).max()
            table = "embed" in name or "lm_head" in name
            assert 0 < error < (0.008 if table else most), name


def test_the_file_tells_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, "llama")
    exported(tmp_path, capsys, "--quantize=int4")
    reader = GGUFReader(tmp_path / "out" / "model-int4.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 50000.0,
        "llama.context_length": 64, "llama.vocab_size": 300, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert told["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == types["rope_freqs.weight"] == "F32"


def test_rows_that_are_no_whole_blocks_stay_exact() -> None:
    odd = File(_work(Shape(1, 40, 64, 4, 2, 300)), KINDS["int4"])
    assert "blk.0.attn_q.weight" in odd.unquantised  # rows of 40
    assert "blk.0.ffn_down.weight" not in odd.unquantised  # rows of 64


def _work(shape: Shape) -> Export:
    class Listed(Export):
        padded_vocabulary = 512

    return Listed(None, shape, "float32")  # type: ignore[arg-type]


def test_bytes_a_weight() -> None:
    whole = File(_work(Shape(2, 64, 64, 4, 2, 64)), KINDS["int8"])
    matrices = [p for p in whole.pieces if len(p.part.shape) == 2]
    assert sum(np.prod(p.byte_shape) for p in matrices) * 8 == 8.5 * sum(
        np.prod(p.part.shape) for p in matrices
    )
    four = {p.name: p for p in File(_work(Shape(2, 64, 64, 4, 2, 64)), KINDS["int4"]).pieces}
    assert four["blk.1.ffn_up.weight"].byte_shape == (64, 36)  # 4.5 bits


def test_stretching_as_transformers_does() -> None:
    config = FAMILIES["llama"]
    shape = Shape(
        2, 32, 64, 4, 2, 300, 50000.0, rope_scaling="llama3", rope_factor=4.0, rope_original_positions=16
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 50000.0 ** -(np.arange(0, 8, 2) / 8)
    factors = rope_factors(shape)
    assert factors is not None
    assert plain / factors == pytest.approx(theirs.numpy(), rel=1e-6)
    assert rope_factors(SMALL) is None


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_rows_of_heads_are_turned_and_turned_back(heads: int, pairs: int, columns: int) -> None:
    rows = np.arange(heads * 2 * pairs * columns).reshape(-1, columns)
    turned = _permuted(rows, heads)
    assert (_permuted(turned, heads, back=True) == rows).all()
    for head in range(heads):
        first = head * 2 * pairs
        for pair in range(pairs):  # the two values that turn together become neighbours
            assert (turned[first + 2 * pair] == rows[first + pair]).all()
            assert (turned[first + 2 * pair + 1] == rows[first + pairs + pair]).all()


def test_a_window_bounds_the_context() -> None:
    assert context(Shape(2, 32, 64, 4, 2, 300, sliding_window=5), 64) == 5
    assert context(SMALL, 64) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format=gguf"], "--quantize and --format gguf go together"),
        (["--format=hf", "--quantize=int8"], "--quantize and --format gguf go together"),
        (["--format=gguf", "--quantize=int8"], "how accurate is it? say --text FILE, or --data PREFIX"),
        (["--format=gguf", "--quantize=int8", "--text=x"], "has no tokenizer.json"),
        (["--format=gguf", "--quantize=int8", "--data=x"], "x: cannot be read: No such file"),
    ],
)
def test_bad_words(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(tmp_path, "llama")
    assert exporting([*words, str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
