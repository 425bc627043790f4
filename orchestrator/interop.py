"""Checkpoints from and to other programs: child processes do the work, this says how to go on."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from clusters.segment import ModelShape
from orchestrator import child
from orchestrator.models import preset, with_preset
from orchestrator.progress import bytes_done
from parallelism.layout import VOCABULARY_MULTIPLE

START = "start.toml"


def import_checkpoint(source: Path, target: Path, model: str | None) -> dict[str, Any]:
    """Make a checkpoint of ours of a foreign one; what was made. Raises ValueError or OSError.

    `model` names a preset or a TOML file, for a source that does not tell the shape of its model.
    """
    arguments = [str(source), str(target), "--vocabulary-multiple", str(VOCABULARY_MULTIPLE)]
    if model:
        arguments += ["--shape", json.dumps(asdict(read_model(model)))]
    result = _work("importing", "checkpoints.interop.importing", arguments)
    result["start"] = str(target / START)
    (target / START).write_text(start_tables(target.name, result))
    return result


def read_model(name: str) -> ModelShape:
    """The model of a preset, or of the table [model] of a TOML file. Raises ValueError."""
    if not name.endswith(".toml"):
        return ModelShape(**preset(name))
    try:
        table = tomllib.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read: {error}") from None
    try:
        given = json.dumps(
            with_preset(table.get("model", table))
        )  # JSON: in strict mode no table is an object
        return TypeAdapter(ModelShape).validate_json(given, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{name}: model.{first['loc'][-1]}: {first['msg']}") from None


def export_checkpoint(checkpoint: Path, target: Path, options: Mapping[str, object]) -> dict[str, Any]:
    """Write a checkpoint of ours in a foreign form; what was written. Raises ValueError or OSError.

    `options` are those of checkpoints.interop.exporting; None leaves one out.
    """
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
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
        f"checkpoint = {json.dumps(f'models/{name}', ensure_ascii=False)}  # relative to a site's scratch",
        f'sha256 = "{result["sha256"]}"',
        "",
    ])  # fmt: skip
