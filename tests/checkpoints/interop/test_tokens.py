"""Tokenizers and texts, as an export reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from checkpoints.interop.tokens import of_data, of_text, vocabulary

LLAMA = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
QWEN = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def trained(directory: Path, expression: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if expression is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(expression), "isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat and the hat", "žluťoučký kůň"] * 5, trainer)
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens([AddedToken("<tag>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize(("expression", "pre"), [(None, "gpt-2"), (LLAMA, "llama-bpe"), (QWEN, "qwen2")])
def test_a_bpe_of_bytes(tmp_path: Path, expression: str | None, pre: str) -> None:
    tokenizer = trained(tmp_path, expression)
    count = tokenizer.get_vocab_size()
    found = vocabulary(tmp_path, count + 3, {"eos_token_id": count - 2})
    assert found is not None
    assert found.pre == pre
    assert {text: number for number, text in enumerate(found.tokens[:count])} == tokenizer.get_vocab()
    assert found.types == [1] * (count - 2) + [3, 4] + [5] * 3  # normal, control, user's, unused
    assert found.merges[0] == "a t"
    assert found.special == {"eos_token_id": count - 2}
    with pytest.raises(ValueError, match="is beyond the model's 10"):
        vocabulary(tmp_path, 10, {})


def test_others_are_left_out(tmp_path: Path) -> None:
    assert vocabulary(tmp_path, 300, {}) is None
    trained(tmp_path, r"\w+|\W+")
    assert vocabulary(tmp_path, 300, {}) is None
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    for change in ({"pre_tokenizer": None}, {"model": {"type": "Unigram"}}, {"model": 7}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(told | change))
        assert vocabulary(tmp_path, 300, {}) is None


@pytest.mark.parametrize("model", [{"type": "BPE"}, {"type": "BPE", "vocab": {"a": "b"}, "merges": []}])
def test_broken_ones_are_refused(tmp_path: Path, model: Any) -> None:
    pre = {"type": "ByteLevel", "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": pre, "model": model}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        vocabulary(tmp_path, 300, {})


def test_the_beginning_of_a_text(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, None)
    (tmp_path / "text").write_text("the cat and the kůň " * 50)
    expected = tokenizer.encode("the cat and the kůň " * 50).ids
    assert of_text(tmp_path / "text", tmp_path, 40).tolist() == expected[:40]
    assert of_text(tmp_path / "text", tmp_path, 10**6).tolist() == expected
    with pytest.raises(ValueError, match=r"has no tokenizer\.json .*: say --tokenizer"):
        of_text(tmp_path / "text", tmp_path / "nowhere", 40)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        of_text(tmp_path / "nothing", tmp_path, 40)


@pytest.mark.parametrize(("code", "kind"), [(8, np.uint16), (4, np.int32)])
def test_the_beginning_of_tokenized_text(tmp_path: Path, code: int, kind: Any) -> None:
    np.arange(1000, dtype=kind).tofile(tmp_path / "a.bin")
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([code])
    (tmp_path / "a.idx").write_bytes(header + b"more")
    assert torch.equal(of_data(tmp_path / "a", 17), torch.arange(17))
    assert len(of_data(tmp_path / "a", 2000)) == 1000
    for broken in (b"", b"MMIDIDX\0", header.replace(b"MM", b"XX"), header[:-1] + bytes([99])):
        (tmp_path / "a.idx").write_bytes(broken)
        with pytest.raises(ValueError, match="not an index of Megatron's"):
            of_data(tmp_path / "a", 5)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        of_data(tmp_path / "b", 5)
