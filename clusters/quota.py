"""How much room a site has for us: what is free, and what the quotas of user, group and project leave.

Whoever keeps the books of a file system tells: `lfs quota` on Lustre, `mmlsquota` on Storage Scale (GPFS),
`quota` elsewhere. Where none answers, the quota is unknown, and that is what is told: no number stands in.
Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator, Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters.paths import SitePaths

_SECONDS = 20.0  # for one of these commands: some sites let nobody call them often, none lets them hang
_KIB = 1024


@dataclass(frozen=True)
class Quota:
    """What is left of one: bytes and files, None where it sets no limit. Below 0 it is passed."""

    whose: str
    bytes_left: int | None
    files_left: int | None


def room(site: SitePaths) -> dict[str, Any]:
    """Free bytes and files of the file system that holds scratch, and what each quota leaves there."""
    place = next(path for path in (site.scratch, *site.scratch.parents) if path.exists())
    free = os.statvfs(place)
    source, mount, kind = mounted(place.resolve(), Path("/proc/self/mounts").read_text())
    quotas, unknown = [], []
    for whose, command in _commands(kind, source, mount, place):
        try:
            quotas.append(read(whose, command))
        except ValueError as error:
            unknown.append(f"{command[0]}: {error}")
    return {
        "free_bytes": free.f_bavail * free.f_frsize,
        "free_files": free.f_favail if free.f_files else None,
        "filesystem": f"{kind} at {mount}",
        "quotas": [asdict(q) for q in quotas],
        "unknown": "" if quotas else (unknown[0] if unknown else f"no command is known for {kind}"),
    }


def mounted(path: Path, mounts: str) -> tuple[str, str, str]:
    """Source, mount point and type of the file system that holds a path, from /proc/mounts."""
    rows = [line.split()[:3] for line in mounts.splitlines()]
    named = [(source, _unescaped(point), kind) for source, point, kind in rows]
    holding = [row for row in named if Path(row[1]) in (path, *path.parents)]
    return max(enumerate(holding), key=lambda at: (len(at[1][1]), at[0]))[1]


def _unescaped(text: str) -> str:
    """A blank is written \\040 there."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match.group(1), 8)), text)


def _commands(kind: str, source: str, mount: str, place: Path) -> Iterator[tuple[str, list[str]]]:
    facts = place.stat()
    user, group = _name(pwd.getpwuid, os.getuid()), _name(grp.getgrgid, facts.st_gid)
    if kind == "lustre":
        yield f"user {user}", ["lfs", "quota", "-u", user, mount]
        yield f"group {group}", ["lfs", "quota", "-g", group, mount]
        project = _project(place)
        if project:
            yield f"project {project}", ["lfs", "quota", "-p", project, mount]
    elif kind == "gpfs":
        device = Path(source).name
        yield f"user {user}", ["mmlsquota", "-Y", "-u", user, device]
        yield f"group {group}", ["mmlsquota", "-Y", "-g", group, device]
    elif kind in ("nfs", "nfs4", "xfs", "ext4"):
        yield f"user {user}", ["quota", "-w", "-p", "-u", "-f", mount]


def _name(look_up: Any, number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


def _project(place: Path) -> str:
    """The directory's project, from `lfs project -d`: "1234 P /scratch/x"; empty for none."""
    try:
        found = re.match(r"\s*(\d+)", _output(["lfs", "project", "-d", str(place)]))
    except ValueError:
        return ""
    return found.group(1) if found and found.group(1) != "0" else ""


def read(whose: str, command: Sequence[str]) -> Quota:
    """Ask one command. Raises ValueError, one line, when it does not tell."""
    parse = parse_gpfs if command[0] == "mmlsquota" else parse_table
    return parse(whose, _output(command))


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS, stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError:
        raise ValueError("not installed") from None
    except (OSError, subprocess.TimeoutExpired):
        raise ValueError("it does not answer") from None
    if done.returncode and not done.stdout.strip():
        raise ValueError((done.stderr.strip().splitlines() or ["it fails without a word"])[-1][:200])
    return done.stdout


def parse_table(whose: str, text: str) -> Quota:
    """`lfs quota` and `quota -p`: KiB, quota, limit, grace, files, quota, limit, grace; 0 for no limit.

    A long name stands on a line of its own; "*" marks what is passed, brackets what is not exact.
    Raises ValueError.
    """
    _, _, below = text.partition("grace")
    words = below.partition("grace")[2].split()  # the header has it twice
    numbers = [word.strip("*[]") for word in words[1:9]]
    if len(numbers) < 7 or not all(numbers[at].isdigit() for at in (0, 1, 2, 4, 5, 6)):
        raise ValueError(f"it says {' '.join(text.split())[:80]!r}")
    used, soft, hard, _, files, files_soft, files_hard = (int(n) if n.isdigit() else 0 for n in numbers[:7])
    return Quota(whose, _left(used * _KIB, soft * _KIB, hard * _KIB), _left(files, files_soft, files_hard))


def parse_gpfs(whose: str, text: str) -> Quota:
    """`mmlsquota -Y`: fields by the names that its header gives them; KiB. Raises ValueError."""
    names: list[str] = []
    for line in text.splitlines():
        fields = line.split(":")
        if fields[:3] == ["mmlsquota", "", "HEADER"]:
            names = fields
        elif names and fields[0] == "mmlsquota":
            told = dict(zip(names, fields))  # noqa: B905 - Python 3.9
            try:
                block, files = ([int(told[kind + part] or 0) for part in ("Usage", "Quota", "Limit")]
                                for kind in ("block", "files"))  # fmt: skip
            except (KeyError, ValueError):
                continue
            return Quota(whose, _left(*(n * _KIB for n in block)), _left(*files))
    raise ValueError(f"it says {' '.join(text.split())[:80]!r}")


def _left(used: int, soft: int, hard: int) -> int | None:
    """Until the lower limit: beyond the soft one writing ends after some days."""
    limits = [limit for limit in (soft, hard) if limit]
    return min(limits) - used if limits else None
