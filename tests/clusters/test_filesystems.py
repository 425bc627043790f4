"""Which file system a path is on, by the catalogue's own paths."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from clusters.filesystems import holding, purge_days
from clusters.machine import Catalogue


@pytest.mark.parametrize(
    ("machine", "path", "name", "days"),
    [
        ("leonardo", "/leonardo_scratch/large/userexternal/me/eurotrain", "scratch", 40),
        ("leonardo", "/leonardo_work/EUHPC_A01/eurotrain", "work", None),
        ("lumi", "/scratch/project_465000001/eurotrain", "scratch", None),  # told to be off
        ("lumi", "/flash/project_465000001/eurotrain", "flash", None),
        ("alps", "/iopsstor/scratch/cscs/me", "iopsstor", 14),
        ("karolina", "/scratch/project/open-1/me", "scratch", 90),
    ],
)
def test_a_path_is_found(machine: str, path: str, name: str, days: int | None) -> None:
    found = holding(Catalogue().load(machine).filesystem, PurePosixPath(path))
    assert found is not None
    assert (found[0], purge_days(found[1])) == (name, days)


@pytest.mark.parametrize("path", ["/leonardo_scratch/larger", "/", "/home/me"])
def test_a_path_of_no_known_file_system(path: str) -> None:
    assert holding(Catalogue().load("leonardo").filesystem, PurePosixPath(path)) is None


def test_a_purge_without_word_of_being_off_counts() -> None:
    lumi = Catalogue().load("lumi").filesystem["scratch"]
    assert lumi.purge_days
    assert purge_days(lumi) is None
