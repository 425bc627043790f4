"""`eurotrain checkpoint reshard`: the child that does it, and its progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import child
from orchestrator.progress import bytes_done


def reshard(source: Path, target: Path, layout: Mapping[str, int | bool], workers: int) -> dict[str, Any]:
    """What came of it: parallelism/reshard.py. Raises ValueError or OSError with one line."""
    arguments = [str(source), str(target), "--layout", json.dumps(dict(layout)), "--workers", str(workers)]
    lines = child.stream("parallelism.reshard", arguments)
    told: dict[str, Any] = next(lines)
    with bytes_done("resharding", told["bytes"]) as was_written:
        for told in lines:
            was_written(told.get("written", 0))
    return told
