"""`python -P -m parallelism.reshard SOURCE TARGET --layout JSON`: a checkpoint, cut for another layout.

JSON lines on standard output: {"bytes": n} once, {"written": n} as it goes, and what came of it last.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints import manifest as form
from checkpoints.lines import exit_code, tell
from checkpoints.manifest import Manifest
from checkpoints.ranges import Box
from checkpoints.reshard import reshard
from clusters.segment import ModelShape
from parallelism.cuts import cuts
from parallelism.layout import Layout

_PREFIX = re.compile(r"(optimizer|outer)\.[a-z_]+\.")  # of tensors that are cut like the one they belong to
_TELL_SECONDS = 0.2


def recut(
    source: Path, directory: Path, layout: Layout, workers: int, was_written: Callable[[int], object]
) -> dict[str, Any]:
    """Write `source` into `directory` in the pieces that the ranks of `layout` would write; what came of it.

    Raises ValueError when the source is no checkpoint of a model or the layout does not fit it, and what
    `checkpoints.reshard.reshard` raises.
    """
    began = time.monotonic()
    old = _committed(source)
    try:
        model = ModelShape(**old.facts["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: its facts tell no model that is known here: {error}") from None
    layout.validate_model(model)
    facts = {**old.facts, "resharded": {"from": str(source), "sha256": old.sha256, "layout": asdict(layout)}}
    result = reshard(source, directory, _wanted(old, model, layout), layout.ranks, facts, workers,
                     was_written=was_written)  # fmt: skip
    return {
        "path": str(result.path),
        "layout": asdict(layout),
        "bytes": result.manifest.bytes,
        "files": len(result.manifest.files),
        "read_bytes": result.read_bytes,
        "seconds": time.monotonic() - began,
    }


def _committed(source: Path) -> Manifest:
    try:
        return form.load(source)
    except FileNotFoundError:
        raise ValueError(f"{source}: no committed checkpoint") from None


def _wanted(old: Manifest, model: ModelShape, layout: Layout) -> dict[str, list[tuple[int, Box]]]:
    """Weights, moments and outer state as the layout cuts them; what is of ranks (random states) as it is."""
    boxes: dict[str, list[tuple[int, Box]]] = defaultdict(list)
    for cut in cuts(model, layout):
        boxes[cut.name].append((cut.rank, cut.box))
    names = {piece.name for piece in old.pieces}
    return {name: boxes[bare] for name in names if (bare := _PREFIX.sub("", name, count=1)) in boxes}


def _main(source: Path, directory: Path, layout: dict[str, Any], workers: int) -> None:
    tell(bytes=sum(piece.bytes for piece in _committed(source).pieces))
    unsaid, said = 0, time.monotonic()

    def was_written(count: int) -> None:
        nonlocal unsaid, said
        unsaid += count
        if time.monotonic() - said > _TELL_SECONDS:
            tell(written=unsaid)
            unsaid, said = 0, time.monotonic()

    tell(**recut(source, directory, Layout.from_mapping(layout), workers, was_written))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="parallelism.reshard")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a directory of checkpoints")
    parser.add_argument("--layout", type=json.loads, required=True)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    sys.exit(exit_code(lambda: _main(given.source, given.target, given.layout, given.workers)))
