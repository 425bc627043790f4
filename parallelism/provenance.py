"""What produced a checkpoint: the code, and what it was told to train."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clusters.segment import Segment

_ROOMS = ("checkpoints", "clusters", "kernels", "parallelism")  # what a training process consists of
_OF_ONE_SEGMENT = (  # may differ between segments that train alike
    "key", "sequence", "scratch", "layout", "checkpointing", "time_limit_seconds", "units_per_hour",
    "unit_cap", "drain_seconds", "max_restarts",
)  # fmt: skip


@functools.cache
def code() -> dict[str, str]:
    """The version, and a hash of the sources that run: equal wherever they are installed."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        for root in _roots(room):
            for path in sorted(root.rglob("*.py")):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{room}/{path.relative_to(root)} {content}\n".encode())
    return {"version": _version(), "sha256": digest.hexdigest()}


def config(segment: Segment) -> str:
    """sha256 of what an island was told to train: model, training, data, rounds, its place in the run."""
    told = {key: value for key, value in asdict(segment).items() if key not in _OF_ONE_SEGMENT}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def cursor(segment: Segment, step: int) -> dict[str, Any]:
    """Where in the text the island goes on after `step` completed steps: parallelism/data.py says how the
    number of a sequence becomes a sequence."""
    per_step = segment.islands * segment.training.global_batch
    return {**asdict(segment.data), "seed": segment.training.seed, "sequence": step * per_step}


def _roots(room: str) -> list[Path]:
    found = find_spec(room)
    return [Path(place) for place in (found.submodule_search_locations or ())] if found else []


def _version() -> str:
    try:
        return version("eurotrain")
    except PackageNotFoundError:
        return "not installed"
