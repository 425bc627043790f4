"""Whatever happens to a checkpoint's bytes is noticed: flips, truncations, lost sectors, swapped files."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from checkpoints.attempts import begin, commit, survey
from checkpoints.manifest import Damaged
from checkpoints.reader import Reader, Shard
from checkpoints.store import write_shards

DAMAGES = int(os.environ.get("EUROTRAIN_DAMAGES", "500"))
Harm = Callable[[random.Random, list[Path]], None]


def flip(chance: random.Random, files: list[Path]) -> None:
    """One bit of one file."""
    path = chance.choice(files)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(chance: random.Random, files: list[Path]) -> None:
    path = chance.choice(files)
    os.truncate(path, chance.randrange(path.stat().st_size))


def extend(chance: random.Random, files: list[Path]) -> None:
    with chance.choice(files).open("ab") as stream:
        stream.write(bytes(chance.randrange(1, 5000)))


def lose_a_sector(chance: random.Random, files: list[Path]) -> None:
    """512 bytes that were never written, or are another file's."""
    path, other = chance.sample(files, 2)
    data = path.read_bytes()
    start = chance.randrange(0, len(data), 512)
    filler = chance.choice([bytes(512), other.read_bytes()[:512]])[: len(data) - start]
    path.write_bytes(data[:start] + filler + data[start + len(filler) :])


def swap(chance: random.Random, files: list[Path]) -> None:
    """Two files, of one checkpoint or of two."""
    one, two = chance.sample(files, 2)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def remove(chance: random.Random, files: list[Path]) -> None:
    chance.choice([path for path in files if path.suffix == ".bin"]).unlink()


HARMS: tuple[Harm, ...] = (flip, flip, flip, truncate, extend, lose_a_sector, swap, remove)


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    """Two checkpoints of two writers each, alike in all but their values."""
    attempts = []
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        attempts.append(begin(tmp_path, f"step-{step:08d}"))
        for writer in range(2):
            shards = [
                Shard(name, (2 * size,), (writer * size,), torch.randn(size, generator=generator))
                for name, size in (("a", 1500), ("b", 3), ("c", 1024))
            ]
            write_shards(attempts[-1], writer, shards)
        commit(attempts[-1], 2, "checkpoint", {"step": step})
    return attempts


def is_noticed(attempt: Path) -> bool:
    """By whoever lists checkpoints, or at the latest by whoever reads all of it."""
    if attempt not in survey(attempt.parent).intact:
        return True
    try:
        Reader(attempt).verify()
    except Damaged:
        return True
    return False


def contents(files: list[Path]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files if path.exists()}


def harmed(chance: random.Random, saved: list[Path]) -> Iterator[tuple[str, set[Path]]]:
    """What was done, and the attempts that are no longer what was written, until it is undone."""
    files = [path for attempt in saved for path in sorted(attempt.iterdir())]
    before = contents(files)
    while True:
        harm = chance.choice(HARMS)
        harm(chance, files)
        after = contents(files)
        yield harm.__name__, {path.parent for path in files if before[path] != after.get(path)}
        for path, data in before.items():
            if after.get(path) != data:
                path.write_bytes(data)


def test_every_damage_is_noticed(saved: list[Path]) -> None:
    chance, done = random.Random(5), Counter[str]()
    assert not any(map(is_noticed, saved))
    for name, attempts in harmed(chance, saved):
        for attempt in saved:
            assert is_noticed(attempt) == (attempt in attempts), f"{name}, after {done.total()} others"
        done[name] += bool(attempts)  # a lost sector may have been zeros before
        if done.total() >= DAMAGES:
            break
    assert min(done.values()) >= DAMAGES / 20, done
