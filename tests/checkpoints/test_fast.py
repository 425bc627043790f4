"""Copies on the node: the user's own, few, and never believed without the manifest at the site."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints import fast, image
from checkpoints.fast import KEPT, LEFTOVER_SECONDS, forget, open_tier
from checkpoints.manifest import Damaged
from checkpoints.reader import Reader, Shard
from checkpoints.saver import Saver
from tests.checkpoints.saving import ROWS, WIDE, State, attempt_of, save


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    (tmp_path / "node").mkdir()
    return open_tier(str(tmp_path / "node"), "run", "a")


@pytest.fixture
def saver(tier: Path) -> Iterator[Saver]:
    made = Saver(0, "this one", WIDE, fast=tier)
    yield made
    made.close()


def saved(saver: Saver, directory: Path, *steps: int) -> list[Path]:
    for step in steps:
        save(saver, directory, State(), step)
        assert [outcome.problem for outcome in saver.finish()] == [None]
    return [attempt_of(directory, step) for step in steps]


def read(attempt: Path, tier: Path) -> tuple[Reader, torch.Tensor]:
    reader, found = Reader(attempt, [tier / attempt.name]), torch.empty(ROWS)
    reader.read(Shard("w", (ROWS,), (0,), found))
    return reader, found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def test_a_copy_serves_where_the_sites_file_is_damaged(saver: Saver, tmp_path: Path, tier: Path) -> None:
    (attempt,) = saved(saver, tmp_path / "site", 3)
    flip(attempt / "writer-00000.bin")
    reader, found = read(attempt, tier)
    assert bool((found == 3).all())
    assert reader.bad_copies == {}


def test_a_damaged_copy_is_named_and_the_sites_file_serves(saver: Saver, tmp_path: Path, tier: Path) -> None:
    (attempt,) = saved(saver, tmp_path / "site", 3)
    copy = tier / attempt.name / "writer-00000.bin"
    flip(copy)
    reader, found = read(attempt, tier)
    assert bool((found == 3).all())
    (damage,) = reader.bad_copies.values()
    assert str(damage).startswith(f"{copy.parent}: writer-00000.bin: bytes 0 to ")
    flip(attempt / "writer-00000.bin")
    with pytest.raises(Damaged, match="crc32c"):
        read(attempt, tier)


def test_another_steps_copy_is_not_believed(saver: Saver, tmp_path: Path, tier: Path) -> None:
    old, new = saved(saver, tmp_path / "site", 3, 4)
    (tier / old.name / "writer-00000.bin").replace(tier / new.name / "writer-00000.bin")
    reader, found = read(new, tier)
    assert bool((found == 4).all())
    assert len(reader.bad_copies) == 1


def test_without_a_copy_the_sites_file_serves(saver: Saver, tmp_path: Path, tier: Path) -> None:
    (attempt,) = saved(saver, tmp_path / "site", 3)
    forget(tier, 0)
    assert list((tmp_path / "node").iterdir()) == [], "the node is not as it was found"
    reader, found = read(attempt, tier)
    assert bool((found == 3).all())
    assert reader.bad_copies == {}


def test_few_are_kept_and_those_of_other_writers_stay(saver: Saver, tmp_path: Path, tier: Path) -> None:
    (tier / "step-00000001.0001").mkdir()
    (tier / "step-00000001.0001" / "writer-00001.bin").touch()
    attempts = saved(saver, tmp_path / "site", 1, 2, 3, 4)
    assert [path.parent.name for path in sorted(tier.glob("*/writer-00000.bin"))] == [
        attempt.name for attempt in attempts[-KEPT:]
    ]
    assert [path.parent.name for path in tier.glob("*/writer-00001.bin")] == ["step-00000001.0001"]


def test_no_room_for_a_copy_costs_no_checkpoint(saver: Saver, tmp_path: Path, tier: Path) -> None:
    tier.rmdir()
    tier.touch()
    (attempt,) = saved(saver, tmp_path / "site", 3)
    Reader(attempt).verify()


def test_a_copy_that_is_cut_short_is_removed(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        fast.copy(tier, "a.0001", 0, memoryview(bytes(8192)), 5000, lambda: None)
    assert list((tier / "a.0001").iterdir()) == []


def test_others_cannot_write_there(tmp_path: Path) -> None:
    own = tmp_path / f"eurotrain-{os.getuid()}"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    with pytest.raises(PermissionError, match="not a directory of this user alone"):
        open_tier(str(tmp_path), "run", "a")
    own.rmdir()
    own.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    with pytest.raises(PermissionError, match="not a directory of this user alone"):
        open_tier(str(tmp_path), "run", "a")


def test_leftovers_go_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    other = open_tier("$NODE_DISK", "other", "a")
    assert other.is_relative_to(tmp_path)
    for name in ("old.0001", "new.0001"):
        (other / name).mkdir()
    os.utime(other / "old.0001", (time.time() - LEFTOVER_SECONDS - 60,) * 2)
    open_tier("$NODE_DISK", "run", "a")
    assert [path.name for path in other.iterdir()] == ["new.0001"]
