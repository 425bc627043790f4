"""What a job on the test bed runs instead of a training: it claims its key, beats, and drains when asked."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from clusters.paths import SegmentPaths, claim
from clusters.segment import Segment


def main(folder: Path) -> int:
    paths = SegmentPaths(folder)
    number = os.environ["SLURM_JOB_ID"]
    with (folder / "starts").open("a") as starts:
        starts.write(f"{number}\n")
    if not claim(paths, {"job": number, "runtime": os.environ["EUROTRAIN_RUNTIME"], "started": time.time()}):
        return 3
    drained: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: drained.append(1))
    until = time.time() + seconds(paths.load())
    while time.time() < until and not drained and not paths.stop.exists():
        paths.heartbeat.touch()
        time.sleep(0.1)
    facts = {"drained": bool(drained), "time": time.time(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    (folder / "facts.json").write_text(json.dumps(facts))
    return 0


def seconds(segment: Segment) -> float:
    """How long it pretends to train."""
    return float(segment.training.steps)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
