"""`eurotrain bench`: what the orchestrator costs and what recovery takes, beside a named peer in one run.

The peer is torchrun (torch.distributed.run) starting the very same ranks by hand on the same machine:
same model, layouts, text, steps and checkpoints; only rounds are left out, because nobody would close them.
Runs alternate, ratios are taken pair by pair, and medians are printed with their spread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import psutil

from clusters import events
from clusters.connection import operators_environment
from clusters.events import read_events
from clusters.paths import SegmentPaths, SitePaths, write_atomically
from clusters.segment import Segment
from orchestrator import demo
from orchestrator.desk import Desk
from orchestrator.segments import segment_for
from orchestrator.spread import spread

_LIMIT_SECONDS = 180.0  # for one run


@dataclass(frozen=True)
class Pair:
    """One repetition: a figure of ours and the peer's, in the same unit."""

    ours: float
    peer: float


def report(name: str, unit: str, pairs: list[Pair], peer: str = "torchrun") -> dict[str, Any]:
    """Medians with their spread, and the ratio ours/peer taken pair by pair."""
    columns = {
        "eurotrain": [p.ours for p in pairs],
        "peer": [p.peer for p in pairs],
        "ratio": [p.ours / p.peer for p in pairs],
    }
    figures = {column: spread(values) for column, values in columns.items()}
    return {"name": name, "unit": unit, "peer_name": peer, "repetitions": len(pairs), **figures}


def recovery(desk: Desk, repetitions: int) -> list[dict[str, Any]]:
    """Seconds from SIGKILL of a rank to the next completed step: ours beside torchrun started again."""
    pairs = []
    for number in range(repetitions):
        found = {}
        for name, command in (("ours", _supervised), ("peer", _torchrun)):
            with _segment(desk, f"recovery-{number}-{name}", "local-a", steps=400) as paths:
                found[name] = _recover(paths, command)
            click.echo(f"recovery {number + 1}/{repetitions} {name}: {found[name]:.2f} s", err=True)
        pairs.append(Pair(**found))
    return [report("SIGKILL of a rank to the next completed step", "s", pairs)]


def overhead(desk: Desk, repetitions: int, steps: int) -> list[dict[str, Any]]:
    """Tokens/s of both islands together: the demo's run beside the same ranks started by hand."""
    whole, stepping = [], []
    for number in range(repetitions):
        ours = _orchestrated(desk, steps)
        peer = _by_hand(desk, f"overhead-{number}", steps)
        whole.append(Pair(ours[0], peer[0]))
        stepping.append(Pair(ours[1], peer[1]))
        rates = f"{ours[0]:.0f} and {peer[0]:.0f} tokens/s"
        click.echo(f"overhead {number + 1}/{repetitions}: {rates}", err=True)
    return [
        report("tokens/s, first step to last (ours: rounds included)", "tokens/s", whole),
        report("tokens/s inside steps", "tokens/s", stepping),
    ]


# ---- ours and the peer, as command lines


def _supervised(paths: SegmentPaths) -> list[str]:
    supervisor = [sys.executable, "-P", "-m", "orchestrator.supervisor", str(paths.root)]
    return [sys.executable, "-P", "-m", "clusters.guard", str(paths.root), "--", *supervisor]


def _torchrun(paths: SegmentPaths) -> list[str]:
    ranks = paths.load().layout
    count = ranks["tp"] * ranks["pp"] * ranks["dp"]
    options = ["--standalone", f"--nproc-per-node={count}", "--max-restarts=0", "--monitor-interval=0.1"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "-m",
        "parallelism.rank",
        str(paths.root),
    ]


@contextlib.contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command at work; afterwards it and all its descendants are gone."""
    quiet = {**operators_environment(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=quiet, start_new_session=True)
    try:
        yield process
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait()


@contextlib.contextmanager
def _segment(desk: Desk, key: str, site: str, steps: int) -> Iterator[SegmentPaths]:
    """A segment of the demo's run that stands alone: no rounds, a run name of its own."""
    spec = demo.prepare(desk, None)
    plan = desk.plan(spec)
    scratch = desk.sites()[site].scratch
    whole = segment_for(plan, f"bench-{key}", site, 0, str(scratch))
    training = replace(whole.training, steps=steps)
    segment = replace(whole, key=f"bench-{key}", training=training, rounds=None, islands=1, island=0)
    paths = SitePaths(scratch).segment(segment.key)
    _clear(paths, segment)
    write_atomically(paths.segment, segment.to_json())
    try:
        yield paths
    finally:
        _clear(paths, segment)


def _clear(paths: SegmentPaths, segment: Segment) -> None:
    shutil.rmtree(paths.root, ignore_errors=True)
    shutil.rmtree(
        SitePaths(Path(segment.scratch)).checkpoints(segment.run, segment.site).parent, ignore_errors=True
    )


# ---- one measurement


def _recover(paths: SegmentPaths, command: Callable[[SegmentPaths], list[str]]) -> float:
    """Kill rank 1 five steps after a checkpoint; seconds until the next step is completed.

    What ends with the rank is started again at once, as a script around torchrun does. torchrun's own
    restart (--max-restarts) could not be measured: with torch 2.13 and gloo the process groups of its
    second attempt never connected.
    """
    every = paths.load().checkpointing.every_steps
    log = paths.logs / "bench.log"
    with contextlib.ExitStack() as started:
        process = started.enter_context(_started(command(paths), log))
        _step_after(paths, process, lambda e: e["step"] >= every + 5)
        victim = _rank_pid(paths, process, 1)
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        if command is _torchrun:
            process.wait(_LIMIT_SECONDS)
            process = started.enter_context(_started(command(paths), log))
        step = _step_after(paths, process, lambda e: e["time"] > killed)
        assert step["step"] <= every + 5, "it went on as if nothing had been lost: was a rank killed at all?"
        return float(step["time"]) - killed


def _step_after(paths: SegmentPaths, process: subprocess.Popen[bytes], wanted: Callable[[Any], bool]) -> Any:
    """The first STEP event that is wanted. Raises RuntimeError when the run ends or takes too long."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    while time.monotonic() < deadline:
        for event in _steps(paths):
            if wanted(event):
                return event
        if process.poll() is not None:
            break
        time.sleep(0.05)
    tail = (paths.logs / "bench.log").read_text(errors="replace")[-800:]
    raise RuntimeError(f"{paths.root.name}: no such step came\n{tail}")


def _steps(paths: SegmentPaths) -> list[dict[str, Any]]:
    return [e for e in read_events(paths.events / "ranks.jsonl")[0] if e["kind"] == events.STEP]


def _rank_pid(paths: SegmentPaths, process: subprocess.Popen[bytes], rank: int) -> int:
    """Ours tells the pids; torchrun's children carry RANK in their environment."""
    for event in reversed(read_events(paths.events / "supervisor.jsonl")[0]):
        if event["kind"] == events.RANKS_STARTED:
            return int(event["pids"][rank])
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise RuntimeError(f"no rank {rank} below process {process.pid}")


def _orchestrated(desk: Desk, steps: int) -> tuple[float, float]:
    """Tokens/s of a whole run through the controller: first step to last, and inside steps."""
    command = [str(Path(sys.executable).parent / "eurotrain"), "demo", "--steps", str(steps)]
    before = set(desk.store.runs())
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=_LIMIT_SECONDS)
    (run,) = set(desk.store.runs()) - before
    islands = desk.state(run).islands.values()
    return (
        sum(i.mean_tokens_per_second for i in islands),
        sum(i.tokens / i.trained_seconds for i in islands),
    )


def _by_hand(desk: Desk, key: str, steps: int) -> tuple[float, float]:
    """The same for both islands started side by side with torchrun."""
    with contextlib.ExitStack() as stack:
        islands = [stack.enter_context(_segment(desk, f"{key}-{site}", site, steps)) for site in demo.SITES]
        started = [
            stack.enter_context(_started(_torchrun(paths), paths.logs / "bench.log")) for paths in islands
        ]
        for paths, process in zip(islands, started, strict=True):
            _step_after(paths, process, lambda e: e["step"] >= steps)
        rates = [_rates(_steps(paths)) for paths in islands]
    return sum(r[0] for r in rates), sum(r[1] for r in rates)


def _rates(steps: list[dict[str, Any]]) -> tuple[float, float]:
    tokens = sum(s["tokens"] for s in steps)
    began = steps[0]["time"] - steps[0]["seconds"]
    return tokens / (steps[-1]["time"] - began), tokens / sum(s["seconds"] for s in steps)
