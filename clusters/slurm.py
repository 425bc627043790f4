"""Slurm at its site: submit a key once, cancel it; clusters/slurm_queue.py looks it up.

submitit writes the batch script and calls sbatch; a job's name is its segment's key, so that it is found
again whatever happened to the answer. Requeueing is off, Slurm's and submitit's: the chain alone goes on.
Standard library and submitit only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters import local
from clusters.paths import SegmentPaths, write_atomically
from clusters.segment import Segment
from clusters.slurm_limits import is_full
from clusters.slurm_queue import LAG_SECONDS, Queue, last_attempt
from clusters.slurm_verdict import ABSENT, ENDED, PENDING, RUNNING, UNKNOWN

_COMMAND_SECONDS = 20.0
# What sbatch says when it does not know whether there is a job now.
_AMBIGUOUS = ("timed out", "Zero Bytes", "Unexpected", "Interrupted", "communication")

# USR1 comes before the time limit, TERM at a cancellation. submitit lets TERM pass by and must not see
# USR1 or USR2; bash would die of them, and all its children with it. So this shell only passes the word on,
# to its process group, in which the guard is the one that heeds it; and it waits for the end.
# A signal ends `wait` with a number of its own: only a wait after the end tells how that was.
_SETUP = """\
watched() {
  "$@" &
  trap : TERM
  trap 'trap "" TERM; kill -TERM 0' USR1
  while true; do
    wait $! || true
    kill -0 $! 2>/dev/null && continue
    wait $! && code=0 || code=$?
    return $code
  done
}""".splitlines()
# The agent may be killed between sbatch and naming the pickle after the job's id.
_FIND_PICKLE = f"""\
for p in {{folder}}/{"?" * 32}.pkl; do
  ln "$p" {{folder}}/${{{{SLURM_JOB_ID}}}}_submitted.pkl 2>/dev/null && break
done"""


@dataclass(frozen=True)
class Request:
    """What a job asks of Slurm beyond its segment; what is empty is left to the site's defaults."""

    nodes: int = 1
    gpus_per_node: int = 0
    gres: str = ""  # instead of gpus_per_node, for sites that want "gpu:a100:4"
    cpus_per_node: int = 0
    memory_per_node: str = ""  # "480G"
    account: str = ""
    partition: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    exclude: Sequence[str] = ()  # nodes
    exclusive: bool = False
    after: Sequence[str] = ()  # keys: start when all of these have ended, however they did
    begin: float = 0.0  # seconds since 1970: not before; 0: as soon as it can
    comment: str = ""
    setup: Sequence[str] = ()  # shell lines before the job's command: modules, variables

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Request:
        """Raises ValueError, naming the field."""
        known = cls.__dataclass_fields__
        for name in raw:
            if name not in known:
                raise ValueError(f"unknown field {name!r} of a Slurm request; known: {', '.join(known)}")
        return cls(**raw)


def submit(
    segment: Segment, paths: SegmentPaths, python: str, request: Request, queue: Queue
) -> dict[str, Any]:
    """Submit the segment's job, once; answers what `queue.look_up` would.

    Raises ValueError with sbatch's reason when Slurm refuses; `held` says why when it only has enough jobs
    now. Where sbatch cannot tell, or another call of it may be under way, the state is unknown, and for a
    minute nothing is submitted.
    """
    known = queue.look_up(segment.key)
    if known["state"] != ABSENT:
        return known
    dependency = _dependency(request.after, queue)
    attempt = begin(paths, time.time())
    if attempt is None or (paths.root / "job.json").exists():
        return {"state": UNKNOWN, "evidence": "another agent is submitting it"}
    try:
        job_id = _sbatch(segment, paths, python, request, dependency)
    except Doubtful as error:
        return {"state": UNKNOWN, "evidence": f"sbatch: {error}"}
    except ValueError as error:
        attempt.unlink()  # Slurm refused: whoever tries next need not wait
        if is_full(str(error)):
            return {"state": ABSENT, "held": f"Slurm takes no more jobs now: {error}"}
        raise
    record = {"job_id": job_id, "submitted": time.time()}
    write_atomically(paths.root / "job.json", json.dumps(record))
    return {**record, "state": PENDING, "started": 0.0, "evidence": f"sbatch gave it the number {job_id}"}


class Doubtful(Exception):
    """sbatch has failed in a way that leaves open whether there is a job."""


def begin(paths: SegmentPaths, now: float) -> Path | None:
    """Leave the mark of a call of sbatch; None when another one is too recent to be judged.

    Of several agents that find an old mark one alone creates the next.
    """
    last = last_attempt(paths)
    if last and now - last.stat().st_mtime < LAG_SECONDS:
        return None
    mark = paths.root / f"submitting.{int(last.suffix[1:]) + 1 if last else 0}"
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return None
    return mark


def _dependency(after: Sequence[str], queue: Queue) -> str:
    """Job numbers of the keys that have not ended. Raises ValueError when one has no number yet."""
    numbers = []
    for key in after:
        job = queue.look_up(key)
        if job["state"] != ENDED and not job.get("job_id"):
            raise ValueError(f"cannot wait for {key}: {job['evidence']}")
        if job["state"] != ENDED:
            numbers.append(job["job_id"])
    return "afterany:" + ":".join(numbers) if numbers else ""


def _sbatch(segment: Segment, paths: SegmentPaths, python: str, request: Request, dependency: str) -> str:
    """The job's number. Raises Doubtful, or ValueError when Slurm refuses."""
    import submitit  # 0.2 s, and only a submission needs it
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = paths.logs / "submitit"
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=0, python=f"watched {shlex.quote(python)}")
        executor.update_parameters(**parameters(segment, paths, request, dependency))
        command = job_command(segment, paths, python)
        function = submitit.helpers.CommandFunction(command, verbose=False, cwd=paths.root)
        return str(executor.submit(function).job_id)
    except FailedSubmissionError as error:
        raise Doubtful(str(error).splitlines()[0]) from error
    except (FailedJobError, RuntimeError) as error:
        reason = " ".join(str(error).replace("sbatch: error: ", "").split())[:300]
        if any(word in reason for word in _AMBIGUOUS):
            raise Doubtful(reason) from error
        raise ValueError(reason or "sbatch failed without a word") from error


def job_command(segment: Segment, paths: SegmentPaths, python: str) -> list[str]:
    """As on a machine without a scheduler, but the guard gives a drain all the time it may take,
    and the supervisor uses all nodes of the job."""
    command = local.job_command(segment, paths, python)
    at = command.index(str(paths.root))
    guard, supervisor = [*command[:at], f"--grace={segment.drain_seconds}"], command[at:-1]
    return [*guard, *supervisor, "--slurm", command[-1]]


def parameters(
    segment: Segment, paths: SegmentPaths, request: Request, dependency: str = ""
) -> dict[str, Any]:
    """submitit's parameters: submitit writes those that are None not at all."""
    folder = shlex.quote(str(paths.logs / "submitit"))
    flags: dict[str, Any] = {
        "no-requeue": True,
        "no-kill": True,  # a lost node shrinks the allocation, the supervisor goes on with the others
        "chdir": str(paths.root),
        "signal": f"B:USR1@{math.ceil(segment.drain_seconds)}",
    }
    if request.begin > time.time():  # relative, since the controller's time zone is not the site's
        flags["begin"] = f"now+{math.ceil(request.begin - time.time())}"
    if request.reservation:
        flags["reservation"] = request.reservation
    return {
        "job_name": segment.key,
        "time": math.ceil(segment.time_limit_seconds / 60),
        "nodes": request.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": request.cpus_per_node or None,
        "gpus_per_node": request.gpus_per_node or None,
        "mem": request.memory_per_node or None,
        "gres": request.gres or None,
        "account": request.account or None,
        "partition": request.partition or None,
        "qos": request.qos or None,
        "constraint": request.constraint or None,
        "exclude": ",".join(request.exclude) or None,
        "exclusive": request.exclusive or None,
        "dependency": dependency or None,
        "comment": request.comment or None,
        "wckey": None,
        "use_srun": False,  # one supervisor, which starts its steps itself
        "stderr_to_stdout": True,
        "setup": [*_SETUP, *_FIND_PICKLE.format(folder=folder).splitlines(), *request.setup],
        "additional_parameters": flags,
    }


def cancel(keys: Sequence[str], queue: Queue) -> list[str]:
    """End the jobs of these keys, waiting or running; their numbers. Raises ValueError when Slurm refuses."""
    jobs = (queue.look_up(key) for key in keys)
    numbers = [job["job_id"] for job in jobs if job["state"] in (PENDING, RUNNING)]
    if numbers:
        _ask(["scancel", *numbers])
    return numbers


def exclude(keys: Sequence[str], nodes: Sequence[str], queue: Queue) -> list[str]:
    """Keep the waiting jobs of these keys away from these nodes and no others; their numbers.

    A job keeps its number and its age in the queue, and a second call changes nothing: cancelling it and
    submitting it anew would risk both. Raises ValueError when Slurm refuses.
    """
    jobs = (queue.look_up(key) for key in keys)
    numbers = [job["job_id"] for job in jobs if job["state"] == PENDING]
    for number in numbers:
        _ask(["scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(nodes)}"])
    return numbers


def _ask(words: Sequence[str]) -> None:
    """Raises ValueError with Slurm's own words when it refuses, or does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{words[0]}: no answer within {_COMMAND_SECONDS:.0f} s") from error
    if done.returncode:
        raise ValueError(f"{words[0]}: {' '.join(done.stderr.split())[:300]}")
