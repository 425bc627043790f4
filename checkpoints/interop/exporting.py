"""`python -P -m checkpoints.interop.exporting CHECKPOINT TARGET --format ...`: our weights in a foreign form.

Prints JSON lines: {"total": bytes}, {"bytes": done since}, and at last {"result": {...}}.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from checkpoints.attempts import candidates, synchronise
from checkpoints.interop import untrusted
from checkpoints.interop.huggingface import DTYPES, Export
from checkpoints.interop.importing import TOKENIZER
from checkpoints.interop.megatron import wanted
from checkpoints.interop.shape import Shape
from checkpoints.lines import exit_code, tell
from checkpoints.manifest import MANIFEST
from checkpoints.reader import Missing, Reader

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="checkpoints.interop.exporting")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--format", choices=_WRITERS, required=True)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--positions", type=int)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    return exit_code(lambda: export(parser.parse_args(arguments)))


def export(given: argparse.Namespace) -> None:
    """Write the directory `target`, whole or not at all. Raises ValueError (Damaged is one) or OSError."""
    if given.target.exists():
        raise ValueError(f"{given.target}: is there already; name another directory")
    if (given.format == "gguf") != (given.quantize is not None):
        raise ValueError("--quantize and --format gguf go together: that is the form of quantised weights")
    reader = Reader(newest(given.checkpoint))
    shape = Shape.from_facts(reader.facts)
    work = Export(reader, shape, given.dtype or _PRECISIONS.get(reader.facts.get("precision", ""), "float32"))
    partial = given.target.with_name(f".{given.target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        more = _WRITERS[given.format](work, partial, given)
        for path in (*partial.rglob("*"), partial):
            synchronise(path)
        partial.rename(given.target)
    except Missing as error:
        raise ValueError(str(error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _tell_result(given.target, reader, work.dtype, more)


def _positions(work: Export, given: argparse.Namespace) -> int:
    positions = given.positions or work.reader.facts.get("sequence_length")
    if positions is None:
        raise ValueError(f"{work.reader.path}: does not tell its sequence length: say --positions")
    return int(positions)


def _tokenizer(work: Export, given: argparse.Namespace) -> Path:
    return Path(given.tokenizer or work.reader.path.parent / TOKENIZER)


def _hugging_face(work: Export, target: Path, given: argparse.Namespace) -> dict[str, Any]:
    positions, tokenizer = _positions(work, given), _tokenizer(work, given)
    files = untrusted.copy_tokenizer(tokenizer, target) if tokenizer.is_dir() else []
    tell(total=sum(map(work.bytes, work.parts)))
    work.write(target, positions, lambda count: tell(bytes=count))
    _name_special_tokens(target)
    return {"tokenizer": files}


def _torch_dist(work: Export, target: Path, _: argparse.Namespace) -> dict[str, Any]:
    from checkpoints.interop import dcp_writer  # torch's DCP takes a second to import

    tensors = {w.name: w.global_shape for w in wanted(work.shape, work.padded_vocabulary)}
    dtype = DTYPES[work.dtype]
    tell(total=sum(torch.Size(shape).numel() for shape in tensors.values()) * dtype.itemsize)

    def read(name: str) -> torch.Tensor:
        values = work.whole(name, tensors[name]).to(dtype)
        tell(bytes=values.nbytes)
        return values

    dcp_writer.write(target, work.reader.facts["step"], work.shape.layers, tensors, read, dtype)
    return {"tokenizer": []}


def _gguf(work: Export, target: Path, given: argparse.Namespace) -> dict[str, Any]:
    from checkpoints.interop import accuracy, gguf_file, tokens  # and with them transformers

    if not (given.text or given.data):
        raise ValueError("how accurate is it? say --text FILE, or --data PREFIX of tokenized text")
    positions, tokenizer = _positions(work, given), _tokenizer(work, given)
    size = work.shape.vocabulary_size
    read = tokens.of_text(given.text, tokenizer, given.tokens) if given.text else None
    read = tokens.of_data(given.data, given.tokens) if read is None else read
    vocabulary = tokens.vocabulary(tokenizer, size, _special_tokens(tokenizer))
    file = gguf_file.File(work, gguf_file.KINDS[given.quantize])
    tell(total=file.bytes)
    path = target / f"model-{given.quantize}.gguf"
    length = gguf_file.context(work.shape, positions)
    file.write(path, positions, vocabulary, lambda count: tell(bytes=count))
    cost = accuracy.measure(work, file.weights(path), read, length)
    return {
        "quantised": given.quantize,
        "unquantised": file.unquantised,
        "context_length": length,
        "tokenizer": [tokens.FILE] if vocabulary else [],
        "accuracy": {"text": str(given.text or given.data), **cost},
    }


_WRITERS = {"hf": _hugging_face, "torch_dist": _torch_dist, "gguf": _gguf}


def newest(place: Path) -> Path:
    """A checkpoint, or the newest of a directory of checkpoints. Raises ValueError when there is none."""
    if (place / MANIFEST).exists():
        return place
    found = candidates(place) if place.is_dir() else []
    if not found:
        raise ValueError(f"{place}: no committed checkpoint")
    return found[0]


def _special_tokens(directory: Path) -> dict[str, int]:
    """Which tokens begin and end a text, where the tokenizer's files say so."""
    if not (directory / "generation_config.json").exists():
        return {}
    told = untrusted.read_json(directory, "generation_config.json", untrusted.LARGEST_CONFIG)
    return {name: told[name] for name in _IDS if type(told.get(name)) is int}


def _name_special_tokens(target: Path) -> None:
    config = json.loads((target / untrusted.CONFIG).read_text()) | _special_tokens(target)
    (target / untrusted.CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _tell_result(target: Path, reader: Reader, dtype: str, more: dict[str, Any]) -> None:
    written = sorted(path for path in target.rglob("*") if path.is_file())
    result: dict[str, Any] = {
        "path": str(target),
        "checkpoint": str(reader.path),
        "sha256": reader.manifest.sha256,
        "step": reader.facts["step"],
        "dtype": dtype,
        "bytes": sum(path.stat().st_size for path in written),
        "files": [str(path.relative_to(target)) for path in written],
    }
    tell(result=result | more)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
