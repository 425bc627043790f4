"""Shapes of known models: presets/<name>.toml, one file per model, its source in the file."""

from __future__ import annotations

import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from orchestrator.suggest import unknown


def preset_names() -> list[str]:
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def preset(name: str) -> dict[str, Any]:
    """Fields of clusters.segment.ModelShape. Raises ValueError naming the nearest preset."""
    if name not in preset_names():
        raise ValueError(unknown("preset", name, preset_names()))
    return tomllib.loads((_folder() / f"{name}.toml").read_text())


def with_preset(table: dict[str, Any]) -> dict[str, Any]:
    """A [model] table, what it does not say taken from the preset it names. Raises ValueError as `preset`."""
    own = {key: value for key, value in table.items() if key != "preset"}
    return preset(str(table["preset"])) | own if "preset" in table else own


def _folder() -> Traversable:
    return resources.files("orchestrator") / "presets"
