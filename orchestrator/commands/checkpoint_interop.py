"""eurotrain checkpoint import | export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator.commands.frame import as_json, command, emit

_new = click.Path(path_type=Path)
_there = click.Path(exists=True, path_type=Path)


@click.command(name="import")
@click.argument("source", type=_there)
@click.argument("target", type=_new)
@click.option(
    "--model", metavar="PRESET|FILE", help="Shape, for torch_dist: a preset, or a TOML with [model]."
)
@as_json
@command
def import_(source: Path, target: Path, model: str | None, as_json: bool) -> None:
    """Make a checkpoint of a foreign model, for a run to start from.

    SOURCE is a directory of Hugging Face's (Llama, Qwen or Mistral family, safetensors) or of Megatron's
    torch_dist, of which the weights are taken. TARGET becomes a
    directory with the checkpoint, the tokenizer's files, and start.toml: what a run.toml needs to go on from
    it. Foreign files are read by a process of their own, which can start, connect to and change nothing else.
    """
    from orchestrator import interop

    facts = interop.import_checkpoint(source, target, model)
    emit(facts, lambda: _imported(facts), wants_json=as_json)


@click.command()
@click.argument("checkpoint", type=_there)
@click.argument("target", type=_new)
@click.option("--format", "form", type=click.Choice(["hf", "torch_dist"]), default="hf", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: as trained.")
@click.option("--positions", type=click.IntRange(min=1), help="Longest sequence. Default: as trained.")
@click.option("--tokenizer", type=_there, help="Directory of its files. Default: as imported.")
@as_json
@command
def export(
    checkpoint: Path,
    target: Path,
    form: str,
    dtype: str | None,
    positions: int | None,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Write a checkpoint (the newest of a directory) in a form that other programs read.

    TARGET becomes a directory of Hugging Face's (hf), which transformers loads, or one that Megatron's --load
    takes (torch_dist).
    """
    from orchestrator import interop

    options = {"format": form, "dtype": dtype, "positions": positions, "tokenizer": tokenizer}
    facts = interop.export_checkpoint(checkpoint, target, options)
    emit(facts, lambda: _exported(facts), wants_json=as_json)


def _imported(facts: dict[str, Any]) -> str:
    from orchestrator.units import format_bytes

    tokenizer = ", ".join(facts["tokenizer"]) or "none found"
    return (
        f"{facts['checkpoint']}: {format_bytes(facts['bytes'])}, sha256 {facts['sha256']}\n"
        f"tokenizer: {tokenizer}\nto start a run from it: {facts['start']}"
    )


def _exported(facts: dict[str, Any]) -> str:
    from orchestrator.units import format_bytes

    size = format_bytes(facts["bytes"])
    return f"{facts['path']}: step {facts['step']}, {facts['dtype']}, {size} in {len(facts['files'])} files"
