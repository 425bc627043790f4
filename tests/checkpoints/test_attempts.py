"""Attempts are written once, committed last, listed newest first, and pruned with care."""

from __future__ import annotations

import json
import mmap
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import attempts
from checkpoints.attempts import Retention, begin, candidates, commit, hold, prune, survey
from checkpoints.image import pack, write_image
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
    names = [f"writer-{n:05d}.bin" for n in range(3)]  # receipts go when the manifest is there
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
    assert prune(tmp_path, Retention(3)) == [made[1], made[0]]
    assert candidates(tmp_path) == [made[4], made[3], made[2]]
    assert prune(tmp_path, Retention(0)) == [made[2]]
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
    assert prune(tmp_path, Retention(2)) == [stale]
    assert young.exists()
    assert active.exists()
    assert prune(tmp_path, Retention(2), stale_seconds=2000.0) == [young]


def test_prune_leaves_damaged_attempts_and_counts_only_intact_ones(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(4)]
    os.truncate(made[3] / "writer-00000.bin", 7)
    (made[2] / MANIFEST).write_text("{}")
    for path in made:
        age(path, 5000.0)
    assert prune(tmp_path, Retention(2)) == []
    assert candidates(tmp_path) == [made[1], made[0]]
    assert {damage.path for damage in survey(tmp_path).damaged} == {made[2], made[3]}


def test_what_cannot_be_read_hides_nothing_else_and_is_kept(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(3)]
    (made[2] / MANIFEST).unlink()
    (made[2] / MANIFEST).mkdir()  # reading it fails with an OSError, as on a broken disk
    (damage,) = survey(tmp_path).damaged
    assert str(damage) == f"{made[2]}: manifest.json cannot be read: Is a directory"
    assert prune(tmp_path, Retention(2), stale_seconds=-1.0) == []
    assert candidates(tmp_path) == [made[1], made[0]]


def test_prune_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [save(tmp_path, step) for step in range(3)]

    def crash(path: Path) -> None:
        raise KeyboardInterrupt(str(path))

    with monkeypatch.context() as patched:
        patched.setattr(attempts.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, Retention(2))
    assert survey(tmp_path).uncommitted == [made[0]]
    age(made[0], 5000.0)
    assert prune(tmp_path, Retention(2)) == [made[0]]


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


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1e5)), max_size=20),
    st.integers(0, 5),
    st.sampled_from([0.0, 10.0, 3600.0]),
    st.integers(0, 10),
)
def test_retention(saved: list[tuple[int, float]], newest: int, seconds: float, steps: int) -> None:
    saved = sorted(saved, reverse=True)
    retention = Retention(newest, seconds, steps)
    kept = retention.kept(saved)
    assert kept >= set(range(min(max(newest, 2), len(saved))))
    for step in {step for step, _ in saved if steps and step % steps == 0}:
        assert min(n for n, (found, _) in enumerate(saved) if found == step) in kept
    if seconds:
        windows = {when // seconds for _, when in saved}
        assert {saved[n][1] // seconds for n in kept} == windows
    again = [saved[n] for n in sorted(kept)]
    assert retention.kept(again) == set(range(len(again))), "what was kept for good goes the next time"


def test_the_first_of_every_hour_and_milestones_stay(tmp_path: Path) -> None:
    made = []
    for step in range(1, 9):
        made.append(begin(tmp_path, f"step-{step:08d}"))
        write_shards(made[-1], 0, shards(1.0))
        commit(made[-1], 1, "checkpoint", {"step": step, "time": 1000.0 * step})
    assert prune(tmp_path, Retention(2, seconds=3600.0, steps=5)) == [made[n] for n in (5, 2, 1)]
    assert candidates(tmp_path) == [made[n] for n in (7, 6, 4, 3, 0)]  # 3 and 0 are the first of their hours


def test_what_is_held_stays(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(3)]
    with hold(made[0]), hold(made[0]):
        assert prune(tmp_path, Retention(2)) == []
        Reader(made[0]).verify()
    assert prune(tmp_path, Retention(2)) == [made[0]]


def test_a_dead_holder_holds_for_a_while_only(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in range(3)]
    pid = os.fork()
    if pid == 0:
        held = hold(made[0])
        held.__enter__()
        os._exit(0)
    os.waitpid(pid, 0)
    (mark,) = made[0].glob(".hold-*")
    assert prune(tmp_path, Retention(2)) == []
    os.utime(mark, (time.time() - 2 * attempts.HOLD_SECONDS,) * 2)
    assert prune(tmp_path, Retention(2)) == [made[0]]


def test_a_hold_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "HOLD_SECONDS", 0.1)
    made = save(tmp_path, 1)
    with hold(made):
        (mark,) = made.glob(".hold-*")
        os.utime(mark, (0, 0))
        deadline = time.monotonic() + 60
        while mark.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_is_not_committed_cannot_be_held(tmp_path: Path) -> None:
    attempt = begin(tmp_path, "a")
    with pytest.raises(FileNotFoundError), hold(attempt):
        pass
    assert list(attempt.iterdir()) == []


def test_whoever_holds_while_it_is_being_deleted_keeps_it_or_learns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hold falls between the look for holds and the hiding of the manifest."""
    made = [save(tmp_path, step) for step in range(3)]
    superfluous = attempts.superfluous
    held = hold(made[0])

    def then_held(*arguments: object) -> list[Path]:
        found = superfluous(*arguments)  # type: ignore[arg-type]
        held.__enter__()
        return found

    monkeypatch.setattr(attempts, "superfluous", then_held)
    assert prune(tmp_path, Retention(2)) == []
    held.__exit__(None, None, None)
    Reader(made[0]).verify()


def test_receipts_of_two_saves_are_no_checkpoint(tmp_path: Path) -> None:
    attempt = begin(tmp_path, "a")
    for writer, save_id in enumerate(("mine", "a dead incarnation's")):
        places = pack([("t", (2,), (writer,), (1,), "uint8")])
        write_image(attempt, writer, places, memoryview(mmap.mmap(-1, 4096)), {"save": save_id})
    with pytest.raises(Damaged, match="the receipts are of different saves"):
        commit(attempt, 2, "checkpoint", {"step": 1})
