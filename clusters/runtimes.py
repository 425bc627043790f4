"""A directory of its own for each guard, in a node's /tmp; what killed ones have left goes.

Slurm may kill everything of a job at once, the guard and its janitor included. What they leave is a directory
whose lock nobody holds any more; the next guard of the same user on the node removes it.

Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "et-"
_LOCK = "lock"


def make_runtime(parent: Path = Path("/tmp")) -> Path:  # noqa: S108 - short, since Ray's sockets lie below it
    """A new directory, mode 0700, this process's and its forks' until the last of them ends."""
    runtime = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    descriptor = os.open(runtime / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)  # closed by exec, kept by fork
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return runtime


def sweep(parent: Path = Path("/tmp")) -> list[Path]:  # noqa: S108
    """Remove the directories that nobody holds; which they were."""
    left = [path for path in parent.glob(f"{_PREFIX}*") if _is_abandoned(path)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def _is_abandoned(runtime: Path) -> bool:
    """Ours, and its lock is free. One without a lock may be in the making."""
    with contextlib.suppress(OSError):
        if runtime.is_symlink() or runtime.stat().st_uid != os.getuid():
            return False
        descriptor = os.open(runtime / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
        return True
    return False
