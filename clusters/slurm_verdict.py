"""What squeue's and sacct's records mean for a segment's key. Pure functions.

sacct has one record per incarnation, and one more each time that an allocation loses a node and goes on:
the first part ends as RESIZING, and the next one's "submit" is the time of the change, not of submission.
Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Iterable, Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters.hostlist import expand
from clusters.slurm_records import Record

PENDING, RUNNING, ENDED, UNKNOWN, ABSENT = "pending", "running", "ended", "unknown", "absent"

_PENDING = {"PENDING", "CONFIGURING", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "EXPEDITING"}
_RESIZING = "RESIZING"
_OUTCOMES = {  # in the guard's words
    "COMPLETED": "completed", "FAILED": "failed", "OUT_OF_MEMORY": "failed", "BOOT_FAIL": "failed",
    "NODE_FAIL": "failed", "LAUNCH_FAILED": "failed", "RECONFIG_FAIL": "failed", "TIMEOUT": "timeout",
    "DEADLINE": "timeout", "CANCELLED": "cancelled", "PREEMPTED": "cancelled", "REVOKED": "cancelled",
    "REQUEUED": "cancelled",
}  # fmt: skip
_GOES_ON = {"REQUEUED", "PREEMPTED", "NODE_FAIL"}  # an incarnation's end, after which another may begin
_USAGE = ("billing", "cpu", "node", "gres/gpu")


@dataclass(frozen=True)
class Incarnation:
    """One start of a job: its records, more than one where its allocation changed its size."""

    parts: tuple[Record, ...]

    @property
    def last(self) -> Record:
        return self.parts[-1]

    def facts(self) -> dict[str, Any]:
        """What a controller wants to know of it, ready for JSON."""
        last, first = self.last, self.parts[0]
        return {
            "job_id": last.job_id,
            "submitted": first.submitted,
            "started": first.started or 0.0,
            "elapsed": sum(p.elapsed for p in self.parts),
            "usage": usage(self.parts),
            "energy_joules": energy(self.parts),
            "nodes": last.nodes,
            "slurm_state": last.state,
            **({"lost_nodes": lost} if (lost := lost_nodes(self.parts)) else {}),
        }


def usage(parts: Iterable[Record]) -> dict[str, float]:
    """Resource-seconds by Slurm's names: of billing, CPUs, nodes and GPUs as Slurm counts them."""
    total: dict[str, float] = {}
    for part in parts:
        for name in _USAGE:
            if name in part.tres:
                total[name] = total.get(name, 0.0) + part.tres[name] * part.elapsed
    return total


def energy(parts: Sequence[Record]) -> float | None:
    """Joules; None where the site did not measure them or what it says cannot be.

    Of an allocation that changed its size the last part has the energy of the steps that ran through.
    """
    found = [p.energy_joules for p in parts if p.energy_joules is not None]
    return sum(found) if found else None


def lost_nodes(parts: Sequence[Record]) -> list[str]:
    """Nodes that an allocation lost, as far as its records name them.

    One that went on with the others was resized; one that ended with a lost node names all its nodes,
    which tells which one it was only if there was no other.
    """
    held = [_names(part.nodes) for part in parts]
    pairs = zip(held, held[1:])  # noqa: B905, RUF007 - Python 3.9 at the sites
    lost = [name for before, after in pairs for name in before if name not in after]
    if parts[-1].state == "NODE_FAIL" and len(held[-1]) == 1:
        lost += held[-1]
    return lost


def _names(nodes: str) -> list[str]:
    try:
        return expand(nodes)
    except ValueError:
        return []


def incarnations(records: Iterable[Record]) -> list[Incarnation]:
    """The accounting's records of one key as incarnations, the latest last."""
    open_parts: dict[str, list[Record]] = {}
    found: list[list[Record]] = []
    for record in sorted(records, key=lambda r: (r.submitted, r.started or r.submitted, r.job_id)):
        parts = open_parts.get(record.job_id)
        if parts is not None and parts[-1].state == _RESIZING:
            parts.append(record)
        else:
            open_parts[record.job_id] = parts = [record]
            found.append(parts)
    return [Incarnation(tuple(parts)) for parts in found]


def judge(queue: list[Record] | None, accounting: list[Record] | None, owner: str = "") -> dict[str, Any]:
    """What became of one key, from squeue's and sacct's records of it; None: that one did not answer.

    `state` is pending, running, ended, unknown, or absent if both have answered and know nothing. Of two
    jobs of one key the one that claimed it counts, `owner` if known; other jobs and incarnations are under
    `others`: their use counts too.
    """
    known = incarnations(accounting or [])
    waiting, booked = _of_owner(owner, queue or [], known)
    current = _current(waiting)
    if current is not None:
        answer = _from_queue(current, booked)
    elif booked:
        answer = _from_accounting(booked, queue is not None)
    elif queue is None or accounting is None:
        silent = " and ".join(n for n, a in (("squeue", queue), ("sacct", accounting)) if a is None)
        return {"state": UNKNOWN, "evidence": f"no answer from {silent}"}
    else:
        return {"state": ABSENT, "evidence": "squeue and sacct know no such job"}
    others = [i.facts() for i in known if not _is(i, answer)]
    return {**answer, "others": others} if others else answer


def _of_owner(
    owner: str, queue: list[Record], known: list[Incarnation]
) -> tuple[list[Record], list[Incarnation]]:
    """What concerns the owner's job; everything where there is no such job."""
    waiting, booked = [r for r in queue if r.job_id == owner], [i for i in known if i.last.job_id == owner]
    return (waiting, booked) if waiting or booked else (queue, known)


def _current(queue: list[Record]) -> Record | None:
    """Of several jobs of one name the one that matters: running, pending or ended, then the latest."""
    order = {RUNNING: 3, PENDING: 2, UNKNOWN: 1, ENDED: 0}
    return max(queue, key=lambda r: (order[_queued(r.state)], r.submitted, r.job_id), default=None)


def _queued(state: str) -> str:
    """squeue's word; there, other than in the accounting, a requeued job is one that waits."""
    return PENDING if state == "REQUEUED" else _meaning(state)


def _meaning(state: str) -> str:
    if state in _RUNNING or state == _RESIZING:
        return RUNNING
    if state in _PENDING:
        return PENDING
    return ENDED if state in _OUTCOMES else UNKNOWN


def _from_queue(record: Record, known: list[Incarnation]) -> dict[str, Any]:
    """squeue is the more current; it does not know the parts of a job that has changed its size."""
    meaning = _queued(record.state)
    parts: tuple[Record, ...] = next((i.parts for i in known if _same(i, record)), ())
    if parts and meaning == ENDED == _meaning(parts[-1].state):
        return _from_accounting([Incarnation(parts)], True)
    if (
        parts and meaning == ENDED and parts[-1].state == _RESIZING
    ):  # what came after it was smaller: by what?
        evidence = f"squeue says {record.state}, sacct has not booked what came after the change of size"
        return {**Incarnation(parts).facts(), "state": UNKNOWN, "evidence": evidence}
    if parts and meaning == ENDED:  # not yet booked as such
        began = parts[-1].started or record.started or 0.0
        elapsed = (record.ended or began) - began
        parts = (*parts[:-1], replace(record, started=began, elapsed=elapsed, tres=parts[-1].tres))
    facts = Incarnation(parts or (record,)).facts()
    facts.update(slurm_state=record.state, nodes=record.nodes)
    return _told(facts, record, "squeue", meaning)


def _from_accounting(known: list[Incarnation], queue_answered: bool) -> dict[str, Any]:
    last = known[-1].last
    meaning = _meaning(last.state)
    if meaning != ENDED or (last.state in _GOES_ON and not queue_answered):
        squeue = "knows no such job" if queue_answered else "does not answer"
        evidence = f"sacct says {last.state}, squeue {squeue}"
        return {**known[-1].facts(), "state": UNKNOWN, "evidence": evidence}
    return _told(known[-1].facts(), last, "sacct", ENDED)


def _told(answer: dict[str, Any], record: Record, source: str, meaning: str) -> dict[str, Any]:
    answer = {**answer, "state": meaning, "evidence": f"{source}: {record.state}"}
    if meaning == PENDING:
        answer.update(started=0.0, reason=record.reason, expected_start=record.started)
    elif meaning == ENDED:
        ended = record.ended or answer["started"] or answer["submitted"]
        answer.update(ended=ended, outcome=_OUTCOMES[record.state], exit_code=record.exit_code)
        if record.started is None or record.started > ended or not (answer["elapsed"] or record.nodes):
            answer["started"] = 0.0  # it never ran; squeue gives such a job its end as its start
    return answer


def _same(incarnation: Incarnation, record: Record) -> bool:
    return incarnation.last.job_id == record.job_id and incarnation.parts[0].submitted == record.submitted


def _is(incarnation: Incarnation, answer: Mapping[str, Any]) -> bool:
    facts = incarnation.parts[0].submitted, incarnation.last.job_id
    return facts == (answer["submitted"], answer["job_id"])
