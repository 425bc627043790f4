"""Attempts are written once, committed last, listed newest first, and pruned with care."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints import attempts
from checkpoints.attempts import begin, candidates, commit, prune, survey
from checkpoints.manifest import MANIFEST, Damaged, Manifest
from checkpoints.reader import Reader, Shard
from checkpoints.store import write_shards


def shards(value: float, count: int = 2) -> list[Shard]:
    return [Shard(f"t{n}", (4, 3), (0, 0), torch.full((4, 3), value)) for n in range(count)]


def save(directory: Path, step: int, value: float = 0.0) -> Path:
    attempt = begin(directory, f"step-{step:08d}")
    write_shards(attempt, 0, shards(value))
    commit(attempt, 1, "checkpoint", {"step": step})
    return attempt


def test_files_of_an_attempt(tmp_path: Path) -> None:
    attempt = begin(tmp_path / "new" / "folder", "step-00000005")
    sizes = [write_shards(attempt, writer, shards(1.0, count=writer)) for writer in range(3)]
    assert sizes == [0, 48, 4096 + 48]  # the second tensor begins at a multiple of 4 KiB
    manifest = commit(attempt, 3, "update", {"round": 1})
    names = [f"writer-{n:05d}.{end}" for n in range(3) for end in ("bin", "json")]
    assert sorted(path.name for path in attempt.iterdir()) == [MANIFEST, *names]
    assert manifest == Reader(attempt).manifest
    assert manifest.bytes == sum(sizes)
    assert Reader(attempt).facts == {"round": 1}


def test_attempts_are_never_reused(tmp_path: Path) -> None:
    first = begin(tmp_path, "step-00000001")
    write_shards(first, 0, shards(1.0))
    second = begin(tmp_path, "step-00000001")
    assert [first.name, second.name] == ["step-00000001.0001", "step-00000001.0002"]
    assert not list(second.iterdir())
    with pytest.raises(FileExistsError):
        write_shards(first, 0, shards(2.0))
    commit(first, 1, "checkpoint", {"step": 1})
    with pytest.raises(FileExistsError, match="committed already"):
        commit(first, 1, "checkpoint", {"step": 1})


def test_names_are_not_patterns(tmp_path: Path) -> None:
    for name in ("local-a", "a.b", "a[1]", "a"):
        assert [begin(tmp_path, name).name for _ in range(2)] == [f"{name}.0001", f"{name}.0002"]


def test_numbers_grow_when_older_attempts_are_gone(tmp_path: Path) -> None:
    first, second = begin(tmp_path, "a"), begin(tmp_path, "a")
    first.rmdir()
    assert begin(tmp_path, "a").name == "a.0003"
    assert second.exists()


def test_a_second_write_leaves_the_first_alone(tmp_path: Path) -> None:
    attempt = begin(tmp_path, "a")
    write_shards(attempt, 0, shards(1.0))
    with pytest.raises(FileExistsError):
        write_shards(attempt, 0, shards(2.0))
    commit(attempt, 1, "checkpoint", {"step": 1})
    Reader(attempt).verify()


def test_newest_first_by_step_then_attempt(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in (900, 1000, 5, 1000)]
    assert candidates(tmp_path) == [made[3], made[1], made[0], made[2]]
    assert candidates(tmp_path / "nowhere") == []


def test_other_things_in_the_directory_are_no_attempts(tmp_path: Path) -> None:
    kept = save(tmp_path, 1)
    (tmp_path / "latest").write_text("x")
    (tmp_path / "notes.0001").write_text("x")
    (tmp_path / "folder").mkdir()
    assert candidates(tmp_path) == [kept]
    assert survey(tmp_path).uncommitted == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: (a / "writer-00001.json").unlink(), "not those of 2 writers: writer-00001.json"),
        (lambda a: write_shards(a, 2, []), "not those of 2 writers: writer-00002.json"),
        (lambda a: (a / "writer-00000.bin").unlink(), "writer-00000.bin is missing"),
        (lambda a: os.truncate(a / "writer-00000.bin", 10), "has 10 bytes, not 4144"),
        (lambda a: (a / "writer-00000.json").write_text("{}"), "a receipt cannot be read"),
    ],
)
def test_a_part_that_is_not_there_cannot_be_committed(tmp_path: Path, spoil: object, reason: str) -> None:
    attempt = begin(tmp_path, "a")
    for writer in range(2):
        write_shards(attempt, writer, shards(1.0))
    spoil(attempt)  # type: ignore[operator]
    with pytest.raises(Damaged, match=reason):
        commit(attempt, 2, "checkpoint", {"step": 1})
    assert survey(tmp_path).uncommitted == [attempt]


@pytest.mark.parametrize(
    "facts",
    [{}, {"step": -1}, {"step": True}, {"step": 1, "loss": float("nan")}, {"step": 1, 1: 1, 10: 1, 2: 1}],
)
def test_facts_that_no_reader_would_accept_are_refused(tmp_path: Path, facts: dict[str, object]) -> None:
    attempt = begin(tmp_path, "a")
    write_shards(attempt, 0, shards(1.0))
    with pytest.raises((ValueError, TypeError)):
        commit(attempt, 1, "checkpoint", facts)
    assert not (attempt / MANIFEST).exists()


def test_facts_come_back_as_json_has_them(tmp_path: Path) -> None:
    attempt = begin(tmp_path, "a")
    write_shards(attempt, 0, [])
    facts = {"step": 1, "pair": (1, 2), "text": "é\n", "deep": {"x": [None, True, 0.1]}}
    assert commit(attempt, 1, "checkpoint", facts).facts == json.loads(json.dumps(facts))


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writing beyond 1 MiB fails half-way, as on a full disk or over a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_no_space_left(tmp_path: Path) -> None:
    older = save(tmp_path, 1)
    attempt = begin(tmp_path, "step-00000002")
    with pytest.raises(OSError, match="too large"):
        write_shards(attempt, 0, [Shard("w", (1 << 20,), (0,), torch.ones(1 << 20))])
    assert list(attempt.iterdir()) == []  # the space is free again
    with pytest.raises(Damaged, match=r"writer-00000.json"):
        commit(attempt, 1, "checkpoint", {"step": 2})
    assert candidates(tmp_path) == [older]
    assert survey(tmp_path).uncommitted == [attempt]


def age(path: Path, seconds: float) -> None:
    for inner in (*path.iterdir(), path):
        os.utime(inner, (time.time() - seconds,) * 2)


def test_prune_keeps_the_newest_and_never_less_than_two(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(5)]
    assert prune(tmp_path, keep=3) == [made[1], made[0]]
    assert candidates(tmp_path) == [made[4], made[3], made[2]]
    assert prune(tmp_path, keep=0) == [made[2]]
    assert candidates(tmp_path) == [made[4], made[3]]
    assert sorted(tmp_path.iterdir()) == [made[3], made[4]]


def test_prune_spares_young_attempts_and_removes_stale_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    stale, young, active = (begin(tmp_path, f"step-0000000{n}") for n in (2, 3, 4))
    for attempt in (stale, young, active):
        write_shards(attempt, 0, shards(1.0))
    for path in (stale, active):
        age(path, 5000.0)
    os.utime(active / "writer-00000.bin")  # still being written, by a writer that began long ago
    age(young, 3000.0)
    assert prune(tmp_path, keep=2) == [stale]
    assert young.exists()
    assert active.exists()
    assert prune(tmp_path, keep=2, stale_seconds=2000.0) == [young]


def test_prune_leaves_damaged_attempts_and_counts_only_intact_ones(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(4)]
    os.truncate(made[3] / "writer-00000.bin", 7)
    (made[2] / MANIFEST).write_text("{}")
    for path in made:
        age(path, 5000.0)
    assert prune(tmp_path, keep=2) == []
    assert candidates(tmp_path) == [made[1], made[0]]
    assert {damage.path for damage in survey(tmp_path).damaged} == {made[2], made[3]}


def test_what_cannot_be_read_hides_nothing_else_and_is_kept(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(3)]
    (made[2] / MANIFEST).unlink()
    (made[2] / MANIFEST).mkdir()  # reading it fails with an OSError, as on a broken disk
    (damage,) = survey(tmp_path).damaged
    assert str(damage) == f"{made[2]}: manifest.json cannot be read: Is a directory"
    assert prune(tmp_path, keep=2, stale_seconds=-1.0) == []
    assert candidates(tmp_path) == [made[1], made[0]]


def test_prune_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [save(tmp_path, step) for step in range(3)]

    def crash(path: Path) -> None:
        raise KeyboardInterrupt(str(path))

    with monkeypatch.context() as patched:
        patched.setattr(attempts.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, keep=2)
    assert survey(tmp_path).uncommitted == [made[0]]
    age(made[0], 5000.0)
    assert prune(tmp_path, keep=2) == [made[0]]


def test_receipts_are_manifests_of_one_file(tmp_path: Path) -> None:
    attempt = begin(tmp_path, "a")
    write_shards(attempt, 3, shards(1.0, count=1))
    receipt = Manifest.from_json((attempt / "writer-00003.json").read_text())
    assert (receipt.kind, dict(receipt.files)) == ("receipt", {"writer-00003.bin": 48})


def test_nothing_is_visible_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that makes a power cut harmless: contents, then names, then the manifest's name."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def named(descriptor: int) -> None:
        calls.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append("name " + Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", named)
    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path, 1)
    attempt = "step-00000001.0001"
    assert calls == [
        f"sync {tmp_path.name}",
        "sync writer-00000.bin",
        "sync .writer-00000.json.tmp",
        "name writer-00000.json",
        f"sync {attempt}",
        "sync .manifest.json.tmp",
        "name manifest.json",
        f"sync {attempt}",
    ]
