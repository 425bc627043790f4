"""What this machine gives a process: cores, memory, disks, limits, commands. Checks of `eurotrain doctor`."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from orchestrator.database import MOUNTS, file_system, refuse_network_file_system
from orchestrator.home import Home

Status = Literal["ok", "warning", "error", "absent"]

GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Ray's object store and the ranks' queues lie there

# What the demo needs; a real run needs more.
CORES = 2
MEMORY = 8 * GIB
DISK = 5 * GIB
SHARED = 1 * GIB  # containers often give 64 MiB
OPEN_FILES = 8192  # what Ray recommends; Ray itself raises the soft limit to the hard one
PROCESSES = 2048  # threads count: Ray with the slots of one island has about 250, and every rank 20

SLURM = ("sbatch", "squeue", "sacct", "scancel", "sinfo")


@dataclass(frozen=True)
class Check:
    """One thing examined. `advice` says what to do about it, and is empty where there is nothing to do."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def checks(home: Home) -> list[Check]:
    """Everything about the machine that needs no Python package to be asked."""
    return [
        enough("cores", cores(), CORES, _plainly, "ranks would share cores"),
        enough("memory", memory(), MEMORY, _in_gib, "use a smaller model, or a machine with more"),
        shared_memory(),
        enough("disk", free(home.root), DISK, _in_gib, "set EUROTRAIN_HOME to a larger disk", home.root),
        file_system_kind(home),
        enough("open files", hard_limit(resource.RLIMIT_NOFILE), OPEN_FILES, _plainly, "raise `ulimit -Hn`"),
        enough("processes", processes(), PROCESSES, _plainly, "raise `ulimit -Hu`: threads count"),
        openssh(),
        slurm(),
    ]


def enough(
    name: str,
    there: float,
    needed: float,
    shown: Callable[[float], str],
    advice: str,
    where: Path | None = None,
) -> Check:
    """Ok where there is as much as the demo needs, else a warning."""
    detail = f"{shown(there)} free at {where}" if where else shown(there)
    if there >= needed:
        return Check(name, "ok", detail)
    return Check(name, "warning", f"{detail}; the demo needs {shown(needed)}", advice)


def _plainly(number: float) -> str:
    return "unlimited" if math.isinf(number) else f"{number:g}"


def _in_gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def cores(cgroups: Path = CGROUPS) -> float:
    """Cores this process may use: its affinity, or less where a container has a quota."""
    quota = _cgroup_limit("cpu.max", cgroups)
    return min(float(len(os.sched_getaffinity(0))), quota)


def memory(cgroups: Path = CGROUPS) -> float:
    """Bytes available on the machine, or the limit of this container or job where that is less."""
    return min(float(psutil.virtual_memory().available), _cgroup_limit("memory.max", cgroups))


def processes(cgroups: Path = CGROUPS) -> float:
    return min(hard_limit(resource.RLIMIT_NPROC), _cgroup_limit("pids.max", cgroups))


def hard_limit(kind: int) -> float:
    limit = resource.getrlimit(kind)[1]
    return math.inf if limit == resource.RLIM_INFINITY else float(limit)


def _cgroup_limit(name: str, cgroups: Path) -> float:
    """A limit of cgroup v2 as this process sees it; infinite where there is none.

    cpu.max holds quota and period in microseconds, the others one number; "max" is no limit.
    """
    own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].split("\n")[0]
    limits = [math.inf]
    for folder in (cgroups / own, *(cgroups / own).parents):
        if not folder.is_relative_to(cgroups) or not (folder / name).exists():
            continue
        first, *period = (folder / name).read_text().split()
        if first != "max":
            limits.append(int(first) / int(period[0]) if period else int(first))
    return min(limits)


def free(path: Path) -> float:
    """Bytes a file below `path` may take, whether or not the directory exists yet."""
    while not path.exists():
        path = path.parent
    return float(shutil.disk_usage(path).free)


def shared_memory(folder: Path = SHARED_MEMORY) -> Check:
    if not folder.is_dir():
        return Check("shared memory", "error", f"{folder} is missing", "Ray needs it: mount a tmpfs there")
    advice = "in a container: `docker run --shm-size=2g`"
    return enough("shared memory", free(folder), SHARED, _in_gib, advice, folder)


def file_system_kind(home: Home, mounts: Path = MOUNTS) -> Check:
    """SQLite on a network file system is refused when the database is opened; here it is foreseen."""
    name, kind = "file system", file_system(home.root, mounts) or "of unknown kind"
    if not home.database.startswith("sqlite"):
        return Check(name, "ok", f"{kind}; the event log is in another database")
    try:
        refuse_network_file_system(home.root / "eurotrain.db", mounts)
    except ValueError as error:
        problem, _, advice = str(error).partition("; ")
        return Check(name, "warning", problem, advice)
    return Check(name, "ok", f"{kind} at {home.root}")


def openssh() -> Check:
    """The operator's own client: it writes its version to standard error."""
    if shutil.which("ssh") is None:
        return Check("OpenSSH", "absent", "no ssh on PATH", "needed to reach sites other than this machine")
    done = subprocess.run(["ssh", "-V"], capture_output=True, text=True, timeout=10, check=False)
    version = re.match(r"OpenSSH_([^\s,]+)", done.stderr)
    if version is None:
        return Check("OpenSSH", "warning", f"ssh is {done.stderr.strip() or 'silent'}", "install OpenSSH")
    return Check("OpenSSH", "ok", version[1])


def slurm() -> Check:
    """Slurm's clients; only needed where a site's jobs are submitted from this machine."""
    missing = [command for command in SLURM if shutil.which(command) is None]
    if not missing:
        return Check("Slurm", "ok", f"{', '.join(SLURM)} on PATH")
    if len(missing) == len(SLURM):
        return Check("Slurm", "absent", "no command of it on PATH", "needed at sites, not on a controller")
    return Check("Slurm", "warning", f"{', '.join(missing)} not on PATH", "load the site's Slurm module")
