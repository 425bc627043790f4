"""A tokenizer's files, as far as an export needs them: for GGUF's own copy, and to read a text with."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from checkpoints.interop import untrusted

FILE = "tokenizer.json"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's enum llama_token_type

# How llama.cpp calls the regular expressions that cut a text before its bytes are paired: by what tells each.
_REGULAR_EXPRESSIONS = {
    r"\p{N}{1,3}": "llama-bpe",  # Llama 3
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|": "qwen2",  # Qwen 2, 2.5 and 3
}


@dataclass(frozen=True)
class Vocabulary:
    """A BPE of bytes."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: Mapping[str, int]  # bos_token_id, eos_token_id


def vocabulary(directory: Path, size: int, special: Mapping[str, int]) -> Vocabulary | None:
    """What tokenizer.json holds, filled up to `size`; None where it is none, or no BPE of bytes known here.

    Raises ValueError for one that contradicts itself or the model.
    """
    if not (directory / FILE).exists():
        return None
    told = untrusted.read_json(directory, FILE, untrusted.LARGEST_TOKENIZER)
    try:
        return _vocabulary(told, size, special)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{directory / FILE}: not a tokenizer: {error!r}") from None


def _vocabulary(told: Mapping[str, Any], size: int, special: Mapping[str, int]) -> Vocabulary | None:
    pre, model = _pre(told), told.get("model")
    if pre is None or not isinstance(model, dict) or model.get("type") != "BPE":
        return None
    tokens, types = [f"[PAD{n}]" for n in range(size)], [_UNUSED] * size
    added = {token["content"]: token for token in told.get("added_tokens") or []}
    known = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    for text, number in known.items():
        if not 0 <= number < size:
            raise ValueError(f"{FILE}: token {number} is beyond the model's {size}")
        tokens[number] = text
        types[number] = (
            _NORMAL if text not in added else _CONTROL if added[text]["special"] else _USER_DEFINED
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary(pre, tokens, types, merges, special)


def _pre(told: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer; None when it is none of those known here."""
    steps = told.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    patterns = [str(step.get("pattern")) for step in steps if step.get("type") == "Split"]
    if not patterns:
        return "gpt-2" if any(step.get("use_regex", True) for step in steps) else None
    plain = patterns[0].replace("\\\\", "\\")
    return next((name for mark, name in _REGULAR_EXPRESSIONS.items() if mark in plain), None)


def of_text(text: Path, tokenizer: Path, count: int) -> torch.Tensor:
    """int64 [N]: the first tokens of a text, at most `count`. Raises ValueError."""
    if not (tokenizer / FILE).exists():
        raise ValueError(f"{tokenizer}: has no {FILE} to read {text} with: say --tokenizer")
    untrusted.read_json(tokenizer, FILE, untrusted.LARGEST_TOKENIZER)
    try:
        with text.open("rb") as stream:
            beginning = stream.read(64 * count).decode("utf-8", "ignore")  # hardly a token is longer
        found = Tokenizer.from_str(untrusted.regular(tokenizer, FILE).read_text()).encode(beginning).ids
    except OSError as error:
        raise ValueError(f"{text}: cannot be read: {error.strerror}") from None
    return torch.tensor(found[:count], dtype=torch.int64)


def of_data(prefix: Path, count: int) -> torch.Tensor:
    """int64 [N]: the first tokens of a Megatron .bin/.idx pair, at most `count`. Raises ValueError."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        with index.open("rb") as stream:
            magic, version, code = struct.unpack("<9sQB", stream.read(18))
        kind = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}.get(code)
        if magic != b"MMIDIDX\x00\x00" or version != 1 or kind is None:
            raise ValueError(f"{index}: not an index of Megatron's")
        return torch.from_numpy(np.fromfile(data, dtype=kind, count=count).astype(np.int64))
    except struct.error:
        raise ValueError(f"{index}: not an index of Megatron's") from None
    except OSError as error:
        raise ValueError(f"{prefix}: cannot be read: {error.strerror}") from None
