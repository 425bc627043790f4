"""A scheduler for a machine without one: submitit's local executor, and /proc for accounting.

It answers the same questions as Slurm does: submit this key, what became of these keys. Standard
library and submitit only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Iterator  # noqa: UP035 - Python 3.9 at the sites

from clusters.paths import SegmentPaths, write_atomically
from clusters.processes import process
from clusters.segment import Segment

# A start within this time of the recorded one is the same process; pids are reused, start times are not.
_SAME_START_SECONDS = 2.0


def job_command(segment: Segment, paths: SegmentPaths, python: str) -> list[str]:
    """What the job runs: the guard, which leaves nothing behind, around the supervisor."""
    limit = f"--time-limit={segment.time_limit_seconds}"
    guard = [python, "-P", "-m", "clusters.guard", limit, str(paths.root)]
    return [*guard, "--", python, "-P", "-m", "orchestrator.supervisor", str(paths.root)]


def submit(segment: Segment, paths: SegmentPaths, python: str = sys.executable) -> dict[str, Any]:
    """Start the segment's job, once: a key that has been submitted or claimed keeps its job.

    The caller must run in a session of its own (the agent does), or the job would share the fate of
    the operator's terminal.
    """
    known = look_up(paths)
    if known["state"] != "absent":
        return known
    import submitit  # 0.2 s, and only a submission needs it

    folder = paths.logs / "submitit"
    executor = submitit.LocalExecutor(folder=folder, max_num_timeout=0)
    # submitit's own limit and requeue stay out of the way: the guard keeps the time, the chain goes on.
    executor.update_parameters(timeout_min=segment.time_limit_seconds / 60 + 24 * 60)
    command = submitit.helpers.CommandFunction(
        job_command(segment, paths, python), verbose=False, cwd=paths.root, env=dict(os.environ)
    )
    with _detached():
        job = executor.submit(command)
    record = {"job_id": str(job.job_id), "submitted": time.time()}
    write_atomically(paths.root / "job.json", json.dumps(record))
    return look_up(paths)


@contextlib.contextmanager
def _detached() -> Iterator[None]:
    """Children started meanwhile hold none of our pipes: who waits for us would wait for the job."""
    kept = [os.dup(descriptor) for descriptor in range(3)]
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        for descriptor in range(3):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for descriptor, original in enumerate(kept):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(nowhere)


def look_up(paths: SegmentPaths) -> dict[str, Any]:
    """What became of a key: state (absent, pending, running, ended), job_id, times, outcome, evidence.

    A job without a record of its end is ended when none of its processes lives; its last heartbeat
    is then the best evidence of when.
    """
    job, claim, end = (_read(paths.root / name) for name in ("job.json", "claim.json", "exit.json"))
    if not job and not claim and not end:
        return {"state": "absent"}
    answer: dict[str, Any] = {
        "job_id": str(job.get("job_id") or claim.get("job") or claim.get("pid", "")),
        "submitted": job.get("submitted", claim.get("started", 0.0)),
        "started": end.get("start", claim.get("started", 0.0)),
    }
    if end:
        return {**answer, "state": "ended", "ended": end["end"], "outcome": end["outcome"],
                "exit_code": end["exit_code"], "evidence": "exit.json"}  # fmt: skip
    if claim and _alive(int(claim["pid"]), claim["started"]):
        return {**answer, "state": "running"}
    if job and _alive(int(job["job_id"]), job["submitted"]):
        return {**answer, "state": "running" if claim else "pending"}
    last = _modified(paths.heartbeat) or answer["started"] or answer["submitted"]
    return {**answer, "state": "ended", "ended": last, "outcome": "failed", "exit_code": None,
            "evidence": "no process and no exit.json; ended at the last heartbeat"}  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _alive(pid: int, recorded: float) -> bool:
    """Whether `pid` lives, and began before the record was written."""
    found = process(pid)
    return found is not None and found.started <= recorded + _SAME_START_SECONDS
