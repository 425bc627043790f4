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
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "torch_dist", "gguf"]),
    help="Default: hf, or gguf where weights are quantised.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: as trained.")
@click.option("--positions", type=click.IntRange(min=1), help="Longest sequence. Default: as trained.")
@click.option("--tokenizer", type=_there, help="Directory of its files. Default: as imported.")
@click.option("--quantize", type=click.Choice(["int8", "int4"]), help="For edge use, as GGUF.")
@click.option("--text", type=_there, help="What the quantised weights' accuracy is measured on: a text,")
@click.option("--data", type=_new, help="or the prefix of a .bin/.idx pair, such as the run's own.")
@click.option("--tokens", type=click.IntRange(min=16), default=1024, show_default=True, help="So many of it.")
@as_json
@command
def export(checkpoint: Path, target: Path, form: str | None, as_json: bool, **options: Any) -> None:
    """Write a checkpoint (the newest of a directory) in a form that other programs read.

    TARGET becomes a directory of Hugging Face's (hf), which transformers loads, one that Megatron's --load
    takes (torch_dist), or one with a file of quantised weights that llama.cpp runs (gguf); how accurate those
    are is measured and printed.
    """
    from orchestrator import interop

    options["format"] = form or ("gguf" if options["quantize"] else "hf")
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

    size, kind = format_bytes(facts["bytes"]), facts.get("quantised", facts["dtype"])
    line = f"{facts['path']}: step {facts['step']}, {kind}, {size} in {len(facts['files'])} files"
    if "accuracy" not in facts:
        return line
    cost = facts["accuracy"]
    lines = [
        line,
        f"on {cost['tokens']} tokens of {cost['text']}: perplexity {cost['perplexity']:.4g} becomes "
        f"{cost['perplexity_quantised']:.4g}, mean KL divergence {cost['mean_kl_nats']:.2g} nats, "
        f"the likeliest token is the same for {cost['same_likeliest']:.1%}",
        f"exact up to {facts['context_length']} tokens; tokenizer: {', '.join(facts['tokenizer']) or 'none'}",
    ]
    if facts["unquantised"]:
        lines.append(f"in fp32, their rows being no whole blocks of 32: {', '.join(facts['unquantised'])}")
    return "\n".join(lines)
