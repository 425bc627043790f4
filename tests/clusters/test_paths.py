"""Files of the contract: where they lie, and that readers see them whole, whoever dies when."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from clusters.paths import SegmentPaths, SitePaths, claim, write_atomically
from clusters.segment import Segment

FORK = multiprocessing.get_context("fork")


def test_where_what_lies() -> None:
    site = SitePaths(Path("/scratch"))
    paths = site.segment("run.a.0000")
    assert {str(p) for p in (
        paths.segment, paths.claim, paths.heartbeat, paths.stop, paths.drain, paths.exit, paths.events,
        paths.logs,
        site.checkpoints("run", "a"), site.outbox("run", 1, "a"), site.inbox("run", 1, "b"),
        site.closed_round("run", 1),
    )} == {
        "/scratch/segments/run.a.0000/segment.json",
        "/scratch/segments/run.a.0000/claim.json",
        "/scratch/segments/run.a.0000/heartbeat",
        "/scratch/segments/run.a.0000/stop",
        "/scratch/segments/run.a.0000/drain",
        "/scratch/segments/run.a.0000/exit.json",
        "/scratch/segments/run.a.0000/events",
        "/scratch/segments/run.a.0000/logs",
        "/scratch/checkpoints/run/a",
        "/scratch/outbox/run/round-000001/a",
        "/scratch/inbox/run/round-000001/b",
        "/scratch/rounds/run/round-000001.json",
    }  # fmt: skip


def test_a_segment_is_loaded_from_its_folder(paths: SegmentPaths, segment: Segment) -> None:
    with pytest.raises(FileNotFoundError):
        paths.load()
    write_atomically(paths.segment, segment.to_json())
    assert paths.load() == segment
    paths.segment.write_text("{}")
    with pytest.raises(ValueError, match="not a segment"):
        paths.load()


# ---- atomic writes


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became durable and what got its name, in order."""
    found: list[str] = []
    rename, link = Path.replace, os.link

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}")
        found.append("sync the folder" if path.is_dir() else f"sync {path.read_text()}")

    def replace(source: Path, target: Path) -> Path:
        found.append("name it")
        return rename(source, target)

    def hard_link(source: Path, target: Path) -> None:
        found.append("name it")
        link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", hard_link)
    monkeypatch.setattr(Path, "replace", replace)
    return found


def test_a_file_is_durable_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, happened: list[str]
) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    write_atomically(tmp_path / "new" / "file", "text")
    assert happened == ["sync text", "name it", "sync the folder"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


TEXTS = ("old " * 30_000, "new! " * 20_000)


def write_for_ever(path: Path) -> None:
    while True:
        for text in TEXTS:
            write_atomically(path, text)


def started(target: Any, *arguments: Any) -> BaseProcess:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def test_readers_see_the_old_text_or_the_new_while_writers_are_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, TEXTS[0])
    for attempt in range(10):
        process = started(write_for_ever, path)
        seen: set[str] = set()
        while seen != set(TEXTS):
            seen.add(path.read_text())
            assert seen <= set(TEXTS)
        time.sleep(attempt / 2000)
        process.kill()
        process.join()
        assert path.read_text() in TEXTS


# ---- claims

CLAIMERS, KEYS = 8, 12


def claim_all(site: SitePaths, me: int, together: Any, wins: Any) -> None:
    won = []
    for number in range(KEYS):
        together.wait(timeout=30.0)
        if claim(site.segment(f"key-{number}"), {"pid": me, "padding": [me] * 20_000}):
            won.append(number)
    wins.put((me, won))


def test_one_of_many_gets_a_claim_and_the_others_see_it_whole(tmp_path: Path) -> None:
    site, together, wins = SitePaths(tmp_path), FORK.Barrier(CLAIMERS), FORK.SimpleQueue()
    processes = [started(claim_all, site, me, together, wins) for me in range(CLAIMERS)]
    holders: dict[int, int] = {}
    while any(p.is_alive() for p in processes):
        for number in range(KEYS):
            path = site.segment(f"key-{number}").claim
            if path.exists():
                record = json.loads(path.read_text())
                assert record["padding"] == [record["pid"]] * 20_000
                assert holders.setdefault(number, record["pid"]) == record["pid"]
    won = dict(wins.get() for _ in processes)
    assert sorted(number for numbers in won.values() for number in numbers) == list(range(KEYS))
    for me, numbers in won.items():
        for number in numbers:
            folder = site.segment(f"key-{number}")
            assert json.loads(folder.claim.read_text())["pid"] == me
            assert [p.name for p in folder.root.iterdir()] == ["claim.json"]


def test_a_claim_is_never_taken_back(paths: SegmentPaths) -> None:
    assert claim(paths, {"pid": 1})
    assert not claim(paths, {"pid": 2})
    assert not claim(paths, {"pid": 1})
    assert json.loads(paths.claim.read_text()) == {"pid": 1}


def test_a_claim_is_durable_too(paths: SegmentPaths, happened: list[str]) -> None:
    claim(paths, {"pid": 1})
    assert happened == ['sync {"pid": 1}', "name it", "sync the folder"]
