"""What Slurm lets this operator do at a site: times, nodes, jobs at a time, and when it runs none.

Asked of scontrol, sacctmgr and squeue, side by side. What does not answer, or cannot be read, limits nothing
here: then sbatch's own refusal is the limit. Standard library only, and Python 3.9: this file travels.
"""

from __future__ import annotations

import getpass
from typing import Any, Iterator, Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters.hostlist import expand
from clusters.slurm_records import duration

ASSOCIATION = ("Account", "Partition", "MaxSubmitJobs", "GrpSubmitJobs", "MaxWall", "DefaultQOS")
QOS = ("Name", "MaxSubmitPU", "MaxSubmitPA", "GrpSubmit", "MaxWall", "MaxTRES")
JOBS = ("Name", "Account", "QOS")
_CLOSED = ("DOWN", "DRAIN", "INACTIVE")  # states of a partition that starts or takes no jobs
# sbatch's words for "not now": there are jobs enough, of the operator's or of everybody's.
_FULL = ("MaxSubmit", "GrpSubmit", "MaxJobCount", "temporarily unable to accept job")

Row = Mapping[str, str]
Told = Mapping[str, "str | None"]


def commands(account: str) -> dict[str, list[str]]:
    """What clusters.slurm_queue.ask is to run."""
    mine = [f"user={getpass.getuser()}", *([f"account={account}"] if account else [])]
    columns = ",".join(f"{name}:|" for name in JOBS[:-1]) + f",{JOBS[-1]}:"
    return {
        "partitions": ["scontrol", "show", "partition", "--oneliner"],
        "reservations": ["scontrol", "show", "reservation", "--oneliner"],
        "associations": ["sacctmgr", "-nP", "show", "assoc", *mine, f"format={','.join(ASSOCIATION)}"],
        "qos": ["sacctmgr", "-nP", "show", "qos", f"format={','.join(QOS)}"],
        "jobs": ["squeue", "--me", "--noheader", f"--Format={columns}"],
    }


def is_full(refusal: str) -> bool:
    """Whether sbatch refused only because there are jobs enough: later it may not."""
    return any(word in refusal for word in _FULL)


def read(told: Told, account: str, partition: str, qos: str, keys: Sequence[str]) -> dict[str, Any]:
    """Of one job: `times` (seconds) and `nodes`, each with who says so. Of all: `jobs`, each with the most,
    how many `others` than those of `keys` there are, and who says so. `windows` in which none of the
    partition's nodes runs any; why the partition is `closed`, or empty."""
    place = _place(told, partition)
    associations = [
        row
        for row in _table(told, "associations", ASSOCIATION)
        if row["Partition"] in ("", place.get("PartitionName"))
    ]
    named = qos or next((row["DefaultQOS"] for row in associations if row["DefaultQOS"]), "normal")
    rules = [row for row in _table(told, "qos", QOS) if row["Name"] in (named, place.get("QoS"))]
    jobs = [row for row in _table(told, "jobs", JOBS) if row["Name"] not in keys]
    name, state = f"partition {place.get('PartitionName', '')}", place.get("State", "")
    return {
        "closed": f"{name} is {state}" if state in _CLOSED else "",
        "times": [*_times(name, place.get("MaxTime", "")), *_per_job(associations, rules)],
        "nodes": [*_number(name, place.get("MaxNodes", "")), *_nodes(rules)],
        "jobs": [*_of_associations(associations, jobs, account), *_of_qos(rules, jobs, account)],
        "windows": [*_windows(told, place)],
    }


def _place(told: Told, partition: str) -> Row:
    """The partition's facts; without a name those of the default one."""
    rows = _lines(told, "partitions")
    wanted = ("PartitionName", partition) if partition else ("Default", "YES")
    return next((row for row in rows if row.get(wanted[0]) == wanted[1]), {})


def _lines(told: Told, name: str) -> list[Row]:
    """ "Name=x State=UP ...": one line of scontrol each."""
    lines = (told.get(name) or "").splitlines()
    pairs = ((word.partition("=") for word in line.split()) for line in lines if "=" in line)
    return [{key: value for key, _, value in line} for line in pairs]


def _table(told: Told, name: str, columns: Sequence[str]) -> list[Row]:
    rows = ([word.strip() for word in line.split("|")] for line in (told.get(name) or "").splitlines())
    return [dict(zip(columns, row)) for row in rows if len(row) == len(columns)]  # noqa: B905


def _times(who: str, text: str) -> Iterator[tuple[float, str]]:
    """Nothing where it is UNLIMITED, empty, or no time."""
    try:
        seconds = duration(text) if text[:1].isdigit() else 0.0
    except ValueError:
        return
    if seconds:
        yield seconds, who


def _number(who: str, text: str) -> Iterator[tuple[int, str]]:
    if text.isascii() and text.isdigit():
        yield int(text), who


def _per_job(associations: Sequence[Row], rules: Sequence[Row]) -> Iterator[tuple[float, str]]:
    for row in associations:
        yield from _times(f"account {row['Account']}", row["MaxWall"])
    for row in rules:
        yield from _times(f"QOS {row['Name']}", row["MaxWall"])


def _nodes(rules: Sequence[Row]) -> Iterator[tuple[int, str]]:
    """MaxTRES: "cpu=128,node=2"."""
    for row in rules:
        counts = dict(part.partition("=")[::2] for part in row["MaxTRES"].split(","))
        yield from _number(f"QOS {row['Name']}", counts.get("node", ""))


def _of_associations(
    associations: Sequence[Row], jobs: Sequence[Row], account: str
) -> Iterator[tuple[int, int, str]]:
    others = sum(not account or job["Account"] == account for job in jobs)
    for row in associations:
        for column in ("MaxSubmitJobs", "GrpSubmitJobs"):
            for most, who in _number(f"account {row['Account']} ({column})", row[column]):
                yield most, others, who


def _of_qos(rules: Sequence[Row], jobs: Sequence[Row], account: str) -> Iterator[tuple[int, int, str]]:
    """Of jobs of a whole account only the operator's own can be counted: a site may hide the others."""
    for row in rules:
        mine = [job for job in jobs if job["QOS"] == row["Name"]]
        of_account = [job for job in mine if not account or job["Account"] == account]
        for column, counted in (("MaxSubmitPU", mine), ("MaxSubmitPA", of_account), ("GrpSubmit", mine)):
            for most, who in _number(f"QOS {row['Name']} ({column})", row[column]):
                yield most, len(counted), who


def _windows(told: Told, place: Row) -> Iterator[dict[str, Any]]:
    """Maintenance of the whole partition: of a part of it Slurm lets jobs run beside."""
    ours = _names(place.get("Nodes", ""))
    for row in _lines(told, "reservations"):
        flags = row.get("Flags", "").split(",")
        whole = "ALL_NODES" in flags or bool(ours and ours <= _names(row.get("Nodes", "")))
        start, end = row.get("StartTime", ""), row.get("EndTime", "")
        if "MAINT" in flags and whole and start.isdigit() and end.isdigit():
            yield {"start": int(start), "end": int(end), "name": row.get("ReservationName", "maintenance")}


def _names(nodes: str) -> set[str]:
    try:
        return set(expand(nodes))
    except ValueError:
        return set()
