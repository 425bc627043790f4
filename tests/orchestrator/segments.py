"""A segment whose ranks are fake, its guard and its supervisor real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from clusters.events import read_events
from clusters.paths import SegmentPaths
from clusters.segment import Checkpointing, Data, ModelShape, Segment, Training
from tests.leftovers import Leftovers

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def segment(scratch: Path, **fields: Any) -> Segment:
    """Two ranks, no limit near."""
    plain: dict[str, Any] = {
        "key": "demo-local-a-0-0",
        "run": "demo",
        "site": "local-a",
        "island": 0,
        "islands": 1,
        "sequence": 0,
        "scratch": str(scratch),
        "layout": {"tp": 2},
        "model": ModelShape(2, 32, 64, 4, 2, 128),
        "training": Training(10, 16, 4, 2, 1e-3),
        "data": Data(("text",)),
        "checkpointing": Checkpointing(5),
        "time_limit_seconds": 600.0,
        "units_per_hour": 1.0,
        "unit_cap": 10.0,
        "drain_seconds": 5.0,
    }
    return Segment(**{**plain, **fields})


class RunningSegment:
    """A segment in a directory, and what happens in it."""

    def __init__(self, root: Path, **fields: Any) -> None:
        self.paths, self.leftovers = SegmentPaths(root), Leftovers()
        root.mkdir(parents=True, exist_ok=True)
        self.paths.segment.write_text(segment(root, **fields).to_json())
        self.processes: list[subprocess.Popen[str]] = []

    def supervise(self, entry: str = "obedient", guarded: bool = True, **env: str) -> subprocess.Popen[str]:
        """In a process group of its own, as a shell starts it."""
        python = [sys.executable, "-P", "-m"]
        command = [*python, "orchestrator.supervisor", str(self.paths.root), "--entry", f"fake_ranks:{entry}"]
        guard = [*python, "clusters.guard", "--grace", "10", str(self.paths.root), "--"]
        environment = {
            **os.environ,
            **env,
            **self.leftovers.environment,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
        process = subprocess.Popen(
            [*guard, *command] if guarded else command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found, _ = read_events(self.paths.events / "supervisor.jsonl")
        return [event for event in found if kind in (None, event["kind"])]

    def wait_for(self, kind: str, count: int = 1, within: float = 60.0) -> dict[str, Any]:
        """The event of this kind with this number."""
        enough = wait_until(lambda: len(self.events(kind)) >= count, within, f"{count} events {kind}")
        assert enough
        self.leftovers.note()
        return self.events(kind)[count - 1]

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.paths.exit.read_text())
        return found

    @property
    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.paths.logs.glob("*.log")))

    def clean_up(self) -> None:
        try:
            self.leftovers.assert_none(within=5)
        finally:
            self.leftovers.kill()
            for process in self.processes:
                process.communicate(timeout=5)


def wait_until(condition: Callable[[], T], within: float, what: str) -> T:
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)
    return found
