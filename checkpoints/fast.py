"""Copies on the node itself (memory or a local disk), beside the checkpoints on the site's file system.

    <root>/eurotrain-<user id>/<run>/<site>/<attempt>/writer-00000.bin

Only files are copied. What counts is decided by the manifest on the site's file system, against which every
block of a copy is verified as it is read; where it fails, or is not there, the site's file is read. No torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

from checkpoints.attempts import writer_name
from checkpoints.image import write_file
from checkpoints.manifest import aligned

KEPT = 2  # attempts, the last that were copied: the newest may not have been committed
LEFTOVER_SECONDS = 86400.0  # of runs that were killed with their node's cleaner: nobody reads them any more


def open_tier(root: str, run: str, site: str) -> Path:
    """The island's directory below `root`, in which $VARIABLES of this node are filled in. Removes what
    others of this user's runs have left behind long ago.

    Raises OSError when it cannot be made, or another user could write there: memory that all users share
    is where a node is fastest.
    """
    own = Path(os.path.expandvars(root)) / f"eurotrain-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(1, "not a directory of this user alone", str(own))
    for attempt in own.glob("*/*/*"):
        with contextlib.suppress(OSError):  # another rank may be at it
            if time.time() - attempt.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(attempt)
    tier = own / run / site
    tier.mkdir(parents=True, exist_ok=True)
    return tier


def copy(tier: Path, name: str, writer: int, image: memoryview, size: int, beat: Callable[[], None]) -> Path:
    """Copy one writer's file of the attempt `name`, then delete its copies of all but the newest ones.
    Raises OSError, and there is no copy."""
    file = f"{writer_name(writer)}.bin"
    (tier / name).mkdir(exist_ok=True)
    write_file(tier / name / file, image[: aligned(size)], size, beat)
    retain(tier, file)
    return tier / name / file


def retain(tier: Path, file: str) -> None:
    """Delete the copies of this name but the newest ones."""
    copies = sorted(tier.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime_ns)
    for path in copies[:-KEPT]:
        remove(path)


def held(tier: Path) -> dict[str, list[str]]:
    """Names of the files that are there, by attempt."""
    found: dict[str, list[str]] = {}
    for path in sorted(tier.glob("*/writer-*.bin")):
        found.setdefault(path.parent.name, []).append(path.name)
    return found


def forget(tier: Path, writer: int | None = None) -> None:
    """Delete a writer's copies, or all: their node is given back."""
    for path in tier.glob("*/*writer-*" if writer is None else f"*/{writer_name(writer)}.bin"):
        remove(path)
    for directory in (tier, tier.parent, tier.parent.parent):
        with contextlib.suppress(OSError):  # others are still there
            directory.rmdir()


def remove(path: Path) -> None:
    """Delete a file, and its attempt's directory with the last one."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
