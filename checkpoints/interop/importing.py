"""`python -P -m checkpoints.interop.importing SOURCE TARGET`: foreign weights become a checkpoint of ours.

Prints JSON lines: {"total": bytes}, {"bytes": done since}, and at last {"result": {...}}.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints.attempts import begin, candidates, commit
from checkpoints.interop import huggingface, megatron, torch_dist, untrusted
from checkpoints.interop.sandbox import confine
from checkpoints.interop.shape import Shape
from checkpoints.lines import exit_code, tell
from checkpoints.store import write_shards

TOKENIZER = (
    "tokenizer"  # the directory beside an imported checkpoint that the tokenizer's files are copied to
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="checkpoints.interop.importing")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--vocabulary-multiple", type=int, required=True)
    parser.add_argument("--shape", help="JSON, for a source that does not tell the shape of its model")
    given = parser.parse_args(arguments)
    confine(given.target)
    shape = Shape.from_facts({"model": json.loads(given.shape)}) if given.shape else None
    return exit_code(lambda: import_weights(given.source, given.target, given.vocabulary_multiple, shape))


def import_weights(source: Path, target: Path, multiple: int, shape: Shape | None = None) -> None:
    """Write `target`: one checkpoint of step 0, and the tokenizer's files beside it.

    `multiple` is that of the padded vocabulary; `shape` is asked for where a source does not tell it. Raises
    ValueError, with one line, for a source that cannot be taken as it is, OSError when it cannot be written.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory")
    if target.exists() and candidates(target):
        raise ValueError(f"{target}: has a checkpoint already; name another directory")
    model = _opened(source, multiple, shape)
    untrusted.tokenizer_files(source)
    tell(total=model.bytes)
    attempt = begin(target, "step-00000000")
    write_shards(attempt, 0, model.shards(lambda count: tell(bytes=count)))
    manifest = commit(attempt, 1, "checkpoint", _facts(model))
    files = untrusted.copy_tokenizer(source, target / TOKENIZER)
    result = {"checkpoint": str(attempt), "sha256": manifest.sha256, "bytes": manifest.bytes}
    tell(result={**result, "model": asdict(model.shape), "tokenizer": files})


def _opened(source: Path, multiple: int, shape: Shape | None) -> huggingface.Model | megatron.Model:
    directory = torch_dist.find(source)
    if directory is None:
        if shape is not None:
            raise ValueError(f"{source}: its {untrusted.CONFIG} tells the model's shape; leave out --model")
        return huggingface.Model(source, multiple)
    if shape is None:
        raise ValueError(f"{source}: torch_dist does not tell the model's shape: say --model")
    return megatron.Model(directory, shape, multiple)


def _facts(model: huggingface.Model | megatron.Model) -> dict[str, Any]:
    """As parallelism/checkpointing.py saves them, where they mean something for weights alone."""
    return {
        "step": 0,
        "tokens": 0,
        "finished": False,
        "model": asdict(model.shape),
        "precision": "bf16" if model.dtypes == {"BF16"} else "fp32",
        "sequence_length": model.positions,
        "outer": None,
        "imported": {"from": model.directory.name, "format": model.format, "dtypes": sorted(model.dtypes)},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
