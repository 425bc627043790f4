"""What squeue and sacct print, as records. Pure functions; clusters/slurm_verdict.py says what they mean.

Both are asked for fields between unit separators and for times in seconds since 1970 (SLURM_TIME_FORMAT),
which Slurm 22.05 to 25 print alike. Their `--json` is not used: it changes with every release, and on
22.05 it ignores every filter and prints the whole cluster's queue, 3.6 kB a job beside 0.15 kB here.

Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

SEPARATOR = "\x1f"
SQUEUE_FIELDS = ("JobID", "Name", "State", "SubmitTime", "StartTime", "EndTime", "exit_code", "NodeList",
                 "tres-alloc", "TimeUsed", "Reason")  # fmt: skip
SACCT_FIELDS = ("JobID", "JobName", "State", "Submit", "Start", "End", "ExitCode", "NodeList", "AllocTRES",
                "ElapsedRaw", "ConsumedEnergyRaw")  # fmt: skip

_NO_TIME = {"", "Unknown", "None", "N/A", "NONE", "0"}
_NO_NODES = {"", "None assigned", "(null)", "None"}
# More than any node draws (a DGX B200: 14 kW). Counters that wrapped or were never read give 1e19 or 4e9 J.
_NODE_WATTS = 20e3


@dataclass(frozen=True)
class Record:
    """One line of squeue or sacct. Times in seconds since 1970, None where there is none (yet)."""

    job_id: str
    name: str
    state: str  # Slurm's word
    submitted: float
    started: float | None
    ended: float | None
    exit_code: int  # 128 + n for signal n
    nodes: str
    tres: Mapping[str, float]
    elapsed: float = 0.0
    energy_joules: float | None = None
    reason: str = ""


def read_squeue(text: str) -> list[Record]:
    """Raises ValueError when the text is not what squeue prints."""
    return [_queued(row) for row in _rows(text, SQUEUE_FIELDS)]


def read_sacct(text: str) -> list[Record]:
    """Raises ValueError when the text is not what sacct prints."""
    return [_booked(row) for row in _rows(text, SACCT_FIELDS)]


def _rows(text: str, fields: Sequence[str]) -> Iterable[dict[str, str]]:
    for number, line in enumerate(text.split("\n")):  # splitlines would split at a name's odd characters
        words = [word.strip() for word in line.split(SEPARATOR)]
        if words == [""]:
            continue
        if len(words) != len(fields):
            raise ValueError(
                f"line {number + 1} has {len(words)} fields instead of {len(fields)}: {line[:80]!r}"
            )
        yield dict(zip(fields, words))  # noqa: B905 - Python 3.9 at the sites


def _queued(row: Mapping[str, str]) -> Record:
    status = _integer(row["exit_code"])  # as wait(2) has it
    return Record(
        job_id=row["JobID"],
        name=row["Name"],
        state=_state(row["State"]),
        submitted=_time(row["SubmitTime"]) or 0.0,
        started=_time(row["StartTime"]),
        ended=_time(row["EndTime"]),
        exit_code=128 + status % 128 if status % 128 else status // 256,
        nodes=_nodes(row["NodeList"]),
        tres=_tres(row["tres-alloc"]),
        elapsed=duration(row["TimeUsed"]),
        reason=row["Reason"],
    )


def _booked(row: Mapping[str, str]) -> Record:
    code, _, number = row["ExitCode"].partition(":")
    counts, elapsed = _tres(row["AllocTRES"]), float(_integer(row["ElapsedRaw"]))
    return Record(
        job_id=row["JobID"],
        name=row["JobName"],
        state=_state(row["State"]),
        submitted=_time(row["Submit"]) or 0.0,
        started=_time(row["Start"]),
        ended=_time(row["End"]),
        exit_code=128 + _integer(number) if _integer(number) else _integer(code),
        nodes=_nodes(row["NodeList"]),
        tres=counts,
        elapsed=elapsed,
        energy_joules=_energy(row["ConsumedEnergyRaw"], elapsed * counts.get("node", 1.0)),
    )


def _state(text: str) -> str:
    """Slurm's word alone: sacct adds who it was ("CANCELLED by 2001")."""
    word = text.split(" ")[0].rstrip("+")
    if not word or not word.replace("_", "").isalpha():
        raise ValueError(f"not a state: {text[:40]!r}")
    return word


def _time(text: str) -> float | None:
    if text in _NO_TIME:
        return None
    return float(_integer(text))


def _integer(text: str) -> int:
    """Raises ValueError: Slurm prints neither signs nor underscores, which int() would take."""
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError(f"not a number: {text[:40]!r}")
    return int(text[:20] or 0)


def duration(text: str) -> float:
    """ "2-03:04:05", "4:05": seconds."""
    days, _, clock = text.rpartition("-")
    seconds = 0
    for word in clock.split(":"):
        seconds = 60 * seconds + _integer(word)
    return float(86400 * _integer(days) + seconds)


def _nodes(text: str) -> str:
    return "" if text in _NO_NODES else text


def _tres(text: str) -> dict[str, float]:
    """ "cpu=2,mem=8000M,gres/gpu=8": counts by name; what has a unit is not counted in anything."""
    pairs = (part.partition("=") for part in text.split(",") if "=" in part)
    return {
        name: float(value)
        for name, _, value in pairs
        if value.isascii() and value.isdigit() and len(value) < 20
    }


def _energy(text: str, node_seconds: float) -> float | None:
    if not text.isdigit() or not text.isascii():
        return None
    joules = float(text)
    # 0 is what Slurm says without counters; a minute of slack, because it reads them after the job's end
    possible = 0 < joules <= _NODE_WATTS * (node_seconds + 60.0)
    return joules if possible else None
