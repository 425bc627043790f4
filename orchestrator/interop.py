"""Checkpoints from and to other programs: child processes do the work, this says how to go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from clusters.segment import ModelShape
from orchestrator import child
from orchestrator.progress import bytes_done
from parallelism.layout import VOCABULARY_MULTIPLE

START = "start.toml"


def import_checkpoint(source: Path, target: Path) -> dict[str, Any]:
    """Make a checkpoint of ours of a foreign one; what was made. Raises ValueError or OSError."""
    arguments = [str(source), str(target), "--vocabulary-multiple", str(VOCABULARY_MULTIPLE)]
    result = _work("importing", "checkpoints.interop.importing", arguments)
    result["start"] = str(target / START)
    (target / START).write_text(start_tables(target.name, result))
    return result


def export_checkpoint(
    checkpoint: Path, target: Path, *, dtype: str | None, positions: int | None, tokenizer: Path | None
) -> dict[str, Any]:
    """Write a checkpoint of ours in a foreign form; what was written. Raises ValueError or OSError."""
    options = {"--dtype": dtype, "--positions": positions, "--tokenizer": tokenizer}
    words = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    return _work("exporting", "checkpoints.interop.exporting", [str(checkpoint), str(target), *words])


def _work(what: str, module: str, arguments: Sequence[str]) -> dict[str, Any]:
    lines = child.stream(module, arguments)
    result: dict[str, Any] = {}
    total = next((line["total"] for line in lines if "total" in line), 0)
    with bytes_done(what, total) as done:
        for line in lines:
            done(line.get("bytes", 0))
            result = line.get("result", result)
    return result


def start_tables(name: str, result: dict[str, Any]) -> str:
    """The tables of a run.toml that go on from an imported model."""
    model = result["model"]
    told = [
        f.name for f in fields(ModelShape) if model.get(f.name) is not None and model[f.name] != f.default
    ]
    return "\n".join([
        "# For a run.toml. Bring this directory under the scratch of every site of the run first.",
        "[model]",
        *(f"{key} = {json.dumps(model[key])}" for key in told),
        "",
        "[start]",
        f"checkpoint = {json.dumps(f'models/{name}')}  # relative to a site's scratch",
        f'sha256 = "{result["sha256"]}"',
        "",
    ])  # fmt: skip
