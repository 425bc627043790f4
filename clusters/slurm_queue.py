"""Asks Slurm about many keys at once: one squeue and one sacct for a whole exchange, side by side.

Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters.paths import SegmentPaths, SitePaths
from clusters.slurm_records import SACCT_FIELDS, SEPARATOR, SQUEUE_FIELDS, Record, read_sacct, read_squeue
from clusters.slurm_verdict import ABSENT, ENDED, PENDING, UNKNOWN, judge

LAG_SECONDS = 60.0  # within which a submission whose answer was lost shows in squeue
_QUERY_SECONDS = 20.0
_DAY = 86400
_NAMES_BYTES = 100_000  # the kernel takes arguments of 128 KiB
# All of them: without this list sacct hides jobs that were cancelled before they became eligible.
_STATES = "BF,CA,CD,DL,F,NF,OOM,PD,PR,R,RQ,RS,RV,S,TO"
_ByName = dict[str, list[Record]]


@dataclass
class Queue:
    """Slurm as seen in one exchange: asked once, however many keys and operations there are."""

    site: SitePaths
    keys: Sequence[str] = ()
    ask: Callable[[Mapping[str, Sequence[str]]], dict[str, str | None]] = field(default_factory=lambda: ask)
    now: Callable[[], float] = time.time
    _seen: tuple[float, _ByName | None, _ByName | None] | None = None

    def look_up(self, key: str) -> dict[str, Any]:
        """What became of a key: state (absent, pending, running, ended, unknown), evidence, times, use."""
        taken, queue, accounting = self._look()
        paths = self.site.segment(key)
        queued, booked = (None if known is None else known.get(key, []) for known in (queue, accounting))
        several = len({record.job_id for record in (*(queued or ()), *(booked or ()))}) > 1
        owner = str(_json(paths.claim).get("job") or "") if several else ""
        return with_files(judge(queued, booked, owner), paths, taken, self.now())

    def _look(self) -> tuple[float, _ByName | None, _ByName | None]:
        if self._seen is None:
            taken = self.now()
            told = self.ask(commands(self.keys, self._oldest(taken)))
            self._seen = taken, _read(read_squeue, told["squeue"]), _read(read_sacct, told["sacct"])
        return self._seen

    def _oldest(self, now: float) -> float:
        """Seconds since the first of the keys was written here, and a day for clocks that differ."""
        files = (self.site.segment(key).segment for key in self.keys)
        return max([now - path.stat().st_mtime for path in files if path.exists()], default=0.0) + _DAY


def commands(keys: Sequence[str], age: float) -> dict[str, list[str]]:
    """squeue and sacct, about the operator's own jobs of these names, of the last `age` seconds."""
    names = ",".join(keys)
    named = [f"--name={names}"] if 0 < len(names) < _NAMES_BYTES else []
    columns = ",".join(f"{name}:{SEPARATOR}" for name in SQUEUE_FIELDS[:-1]) + f",{SQUEUE_FIELDS[-1]}:"
    window = [f"--starttime=now-{math.ceil(age)}", "--endtime=now", f"--state={_STATES}"]
    return {
        "squeue": ["squeue", "--me", "--states=all", "--noheader", *named, f"--Format={columns}"],
        "sacct": ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2",
                  f"--delimiter={SEPARATOR}", *window, *named, f"--format={','.join(SACCT_FIELDS)}"],
    }  # fmt: skip


def ask(questions: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """What each command prints; None where it fails or takes too long. They run side by side."""
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
    deadline = time.monotonic() + _QUERY_SECONDS
    running = {name: _start(command, environment) for name, command in questions.items()}
    return {name: _output(process, deadline) for name, process in running.items()}


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            errors="replace", env=dict(environment),
        )  # fmt: skip
    except OSError:
        return None


def _output(process: subprocess.Popen[str] | None, deadline: float) -> str | None:
    if process is None:
        return None
    try:
        text, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    return text if process.returncode == 0 else None


def _read(reader: Callable[[str], list[Record]], text: str | None) -> _ByName | None:
    """Records by the job's name, or None: what cannot be read is no answer."""
    if text is None:
        return None
    try:
        records = reader(text)
    except ValueError:
        return None
    named: _ByName = {}
    for record in records:
        named.setdefault(record.name, []).append(record)
    return named


# ---- what the segment's own files add


def with_files(answer: dict[str, Any], paths: SegmentPaths, taken: float, now: float) -> dict[str, Any]:
    """Slurm's word on a key, and what the segment's files say: its submission, its guard's record of the end.

    A key that was submitted is not absent because Slurm does not know it: it does not know it yet, or
    no longer.
    """
    if answer["state"] not in (ABSENT, ENDED):
        return answer
    job, end = _json(paths.root / "job.json"), _json(paths.exit)
    if answer["state"] == ENDED and _belongs(end, answer):
        evidence = f"{answer['evidence']}; exit.json"
        return {**answer, "outcome": end["outcome"], "exit_code": end["exit_code"], "evidence": evidence}
    if answer["state"] == ENDED:
        return answer
    if end:
        facts = {"job_id": job.get("job_id", ""), "submitted": job.get("submitted", end["start"])}
        times = {"started": end["start"], "ended": end["end"]}
        return {**facts, **times, "state": ENDED, "outcome": end["outcome"], "exit_code": end["exit_code"],
                "evidence": "exit.json; Slurm no longer knows the job"}  # fmt: skip
    if job:
        state = PENDING if job["submitted"] >= taken else UNKNOWN
        return {
            **job,
            "state": state,
            "started": 0.0,
            "evidence": f"sbatch gave it the number {job['job_id']}",
        }
    last = last_attempt(paths)
    if last and now - last.stat().st_mtime < LAG_SECONDS:
        return {"state": UNKNOWN, "evidence": "sbatch was called less than a minute ago; its answer was lost"}
    return answer


def last_attempt(paths: SegmentPaths) -> Path | None:
    """The latest call of sbatch for a segment, by its marker: `submitting.<number>`."""
    return max(paths.root.glob("submitting.*"), key=lambda p: int(p.suffix[1:]), default=None)


def _belongs(end: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    """Whether a guard's record is of this incarnation: two clocks, so a minute either way."""
    return bool(end) and answer["started"] - 60 <= end["start"] and end["end"] <= answer["ended"] + 60


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
