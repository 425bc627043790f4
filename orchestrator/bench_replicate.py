"""`eurotrain bench replicate`: how far a checkpoint shrinks for a slow link, and how fast, beside ZipNN."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from orchestrator import child
from orchestrator.bench import Pair, report

_MODULE = "checkpoints.bench.compression"  # ZipNN needs torch
_MEASURED = {
    "ratio": ("lossless ratio", "x", 1.0),
    "packing": ("packing", "MB per CPU second", 1e6),
    "unpacking": ("unpacking", "MB per CPU second", 1e6),
}


def compression(checkpoint: Path, repetitions: int) -> list[dict[str, Any]]:
    """One row per kind of tensor and figure. Raises ValueError where there is no checkpoint, or no ZipNN."""
    pairs: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for line in child.stream(_MODULE, [str(checkpoint), str(repetitions)]):
        for figure in _MEASURED:
            pairs[line["kind"], figure].append(Pair(line["ours"][figure], line["peer"][figure]))
    return [_row(kind, figure, found) for (kind, figure), found in pairs.items()]


def _row(kind: str, figure: str, pairs: list[Pair]) -> dict[str, Any]:
    name, unit, scale = _MEASURED[figure]
    scaled = [Pair(pair.ours / scale, pair.peer / scale) for pair in pairs]
    return report(f"{name}: {kind}", unit, scaled, peer="ZipNN")
