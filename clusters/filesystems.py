"""Which file system of a machine holds a path, and what the catalogue knows of it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Mapping  # noqa: UP035 - Python 3.9 syntax, as in the whole room

from clusters.groups import FileSystem

_PLACEHOLDER = re.compile(r"[<{]")


def holding(known: Mapping[str, FileSystem], path: PurePosixPath) -> tuple[str, FileSystem] | None:
    """The file system with the longest path that leads to this one, and its name; None when none does.

    Catalogued paths have placeholders, "/scratch/project_<number>": what stands before them must agree.
    """
    found = [(len(_fixed(fs)), name, fs) for name, fs in known.items() if fs.path and _leads(fs, path)]
    return max(found)[1:] if found else None


def purge_days(fs: FileSystem) -> int | None:
    """Files older than that are deleted; None where nobody does, or nobody told."""
    if fs.purge_active and not fs.purge_active.value:
        return None
    return fs.purge_days.value if fs.purge_days else None


def _fixed(fs: FileSystem) -> str:
    assert fs.path is not None
    return _PLACEHOLDER.split(fs.path.value)[0]


def _leads(fs: FileSystem, path: PurePosixPath) -> bool:
    assert fs.path is not None
    fixed = _fixed(fs)
    if fixed != fs.path.value:
        return str(path).startswith(fixed)
    return PurePosixPath(fixed) in (path, *path.parents)
