"""The site's side of staging: taken when whole, never half, asked for without reading."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import pieces, staging
from clusters.paths import SitePaths
from clusters.pieces import StagedFile, measure
from clusters.segment import Segment
from tests.clusters.test_agent import ask

CONTENT = bytes(range(256)) * 4  # 1024 bytes: four pieces of 300, the last one short
PIECE = 300


@pytest.fixture
def site(tmp_path: Path) -> SitePaths:
    (tmp_path / "scratch").mkdir()
    return SitePaths(tmp_path / "scratch")


@pytest.fixture
def wanted(tmp_path: Path) -> StagedFile:
    (tmp_path / "source").write_bytes(CONTENT)
    return measure(tmp_path / "source", "data/x.bin", PIECE)


def take(site: SitePaths, *files: StagedFile, **more: Any) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = staging.take(site, [f.to_json() for f in files], **more)["files"]
    return told


def part(site: SitePaths, wanted: StagedFile) -> Path:
    return site.scratch / wanted.part


def needs(*files: StagedFile) -> dict[str, Any]:
    return {"files": [[f.path, f.size, f.sha256] for f in files], "advice": "eurotrain stage here"}


def test_room_is_made_and_a_whole_file_takes_its_place(site: SitePaths, wanted: StagedFile) -> None:
    assert take(site, wanted) == [{"state": "arriving", "have": 0}]
    assert part(site, wanted).read_bytes() == b""
    part(site, wanted).write_bytes(CONTENT)
    assert take(site, wanted) == [{"state": "there", "age": 0}]
    assert (site.scratch / "data/x.bin").read_bytes() == CONTENT
    assert not part(site, wanted).exists()


@given(cut=st.integers(0, len(CONTENT)))
def test_cut_off_at_any_byte_it_is_gone_on_with_from_there(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    site = SitePaths(tmp_path_factory.mktemp("s"))
    (site.scratch / "source").write_bytes(CONTENT)
    wanted = measure(site.scratch / "source", "x", PIECE)
    take(site, wanted)
    part(site, wanted).write_bytes(CONTENT[:cut])
    (told,) = take(site, wanted)
    if cut < len(CONTENT):
        assert told == {"state": "arriving", "have": cut}
        with part(site, wanted).open("ab") as stream:
            stream.write(CONTENT[cut:])
        (told,) = take(site, wanted)
    assert told["state"] == "there"


@given(at=st.integers(0, len(CONTENT) - 1), arrived=st.integers(1, len(CONTENT)))
def test_a_flipped_bit_costs_its_piece_and_what_is_behind(
    tmp_path_factory: pytest.TempPathFactory, at: int, arrived: int
) -> None:
    site = SitePaths(tmp_path_factory.mktemp("s"))
    (site.scratch / "source").write_bytes(CONTENT)
    wanted = measure(site.scratch / "source", "x", PIECE)
    take(site, wanted)
    damaged = bytearray(CONTENT)
    damaged[at] ^= 1
    part(site, wanted).write_bytes(damaged[:arrived])
    (told,) = take(site, wanted)
    whole_pieces = arrived if arrived == len(CONTENT) else arrived // PIECE * PIECE
    assert told == {"state": "arriving", "have": at // PIECE * PIECE if at < whole_pieces else arrived}


def test_more_than_the_file_is_cut_to_its_size(site: SitePaths, wanted: StagedFile) -> None:
    take(site, wanted)
    part(site, wanted).write_bytes(CONTENT + b"twice appended")
    assert take(site, wanted)[0]["state"] == "there"


def test_a_call_reads_one_piece_at_least_and_goes_on_in_the_next(site: SitePaths, wanted: StagedFile) -> None:
    take(site, wanted)
    part(site, wanted).write_bytes(CONTENT)
    for done in (300, 600, 900):
        assert take(site, wanted, seconds=0.0) == [{"state": "unread", "have": done}]
        with pytest.raises(staging.NotStaged, match="is not there"):
            staging.staged(site, needs(wanted))
    assert take(site, wanted, seconds=0.0)[0]["state"] == "there"


def test_what_is_there_is_not_read_twice(
    site: SitePaths, wanted: StagedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(site, wanted)
    part(site, wanted).write_bytes(CONTENT)
    take(site, wanted)
    monkeypatch.setattr(staging, "is_good", lambda *_: pytest.fail("read again"))
    assert take(site, wanted)[0]["state"] == "there"
    assert staging.staged(site, needs(wanted))["oldest"] < 60


def test_a_doubted_file_is_read_again_and_found_out(site: SitePaths, wanted: StagedFile) -> None:
    take(site, wanted)
    part(site, wanted).write_bytes(CONTENT)
    take(site, wanted)
    file = site.scratch / "data/x.bin"
    before = file.stat()
    with file.open("rb+") as stream:
        stream.write(b"\xff")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # a bit that rots tells nobody
    assert take(site, wanted)[0]["state"] == "there"
    staging.doubt(site, ["data/x.bin"])
    assert take(site, wanted) == [{"state": "other"}]


def test_a_file_already_in_its_place_counts_once_it_is_verified(site: SitePaths, wanted: StagedFile) -> None:
    (site.scratch / "data").mkdir()
    (site.scratch / "data/x.bin").write_bytes(CONTENT)
    with pytest.raises(staging.NotStaged, match="has changed since it was verified"):
        staging.staged(site, needs(wanted))
    assert take(site, wanted)[0]["state"] == "there"
    staging.staged(site, needs(wanted))


def test_half_verified_is_not_verified(site: SitePaths, wanted: StagedFile) -> None:
    (site.scratch / "data").mkdir()
    (site.scratch / "data/x.bin").write_bytes(CONTENT)
    assert take(site, wanted, seconds=0.0) == [{"state": "unread", "have": PIECE}]
    with pytest.raises(staging.NotStaged, match="has changed since it was verified"):
        staging.staged(site, needs(wanted))


@pytest.mark.parametrize("content", [b"other", bytes(1024)])
def test_another_file_in_its_place_stays_unless_told(
    site: SitePaths, wanted: StagedFile, content: bytes
) -> None:
    (site.scratch / "data").mkdir()
    (site.scratch / "data/x.bin").write_bytes(content)
    assert take(site, wanted) == [{"state": "other"}]
    assert take(site, wanted, replace=True) == [{"state": "arriving", "have": 0}]
    part(site, wanted).write_bytes(CONTENT)
    assert (site.scratch / "data/x.bin").read_bytes() == content, "until the other is whole"
    assert take(site, wanted, replace=True)[0]["state"] == "there"
    assert (site.scratch / "data/x.bin").read_bytes() == CONTENT


def test_an_empty_file(site: SitePaths, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    empty = measure(tmp_path / "empty", "data/empty", PIECE)
    assert take(site, empty)[0]["state"] == "there"
    staging.staged(site, needs(empty))


# ---- before a submission


def test_what_was_purged_or_changed_is_told_with_what_to_type(site: SitePaths, wanted: StagedFile) -> None:
    take(site, wanted)
    part(site, wanted).write_bytes(CONTENT)
    take(site, wanted)
    file = site.scratch / "data/x.bin"
    file.write_bytes(bytes(1024))
    with pytest.raises(staging.NotStaged, match=r"x\.bin has changed since it was verified: type `eur"):
        staging.staged(site, needs(wanted))
    file.write_bytes(b"short")
    with pytest.raises(staging.NotStaged, match="has other contents than were staged"):
        staging.staged(site, needs(wanted))
    file.unlink()
    with pytest.raises(staging.NotStaged, match=r"x\.bin is not there: type `eurotrain stage here`"):
        staging.staged(site, needs(wanted))


def test_a_segment_is_not_submitted_without_what_it_needs(tmp_path: Path, segment: Segment) -> None:
    operation = {
        "op": "submit",
        "segment": segment.to_json(),
        "needs": {"files": [["data/x.bin", 1, "s"]], "advice": "A"},
    }
    (told,) = ask(tmp_path, operation)
    assert told == {"ok": False, "error": "data/x.bin is not there: type `A`", "unstaged": True}
    assert not (tmp_path / "segments").exists()


def test_refreshing_makes_young_and_stays_verified(site: SitePaths, wanted: StagedFile) -> None:
    take(site, wanted)
    part(site, wanted).write_bytes(CONTENT)
    take(site, wanted)
    file, old = site.scratch / "data/x.bin", time.time() - 90 * 86400
    os.utime(file, (old, old))
    staging.doubt(site, ["data/x.bin"])
    take(site, wanted)
    assert staging.staged(site, needs(wanted))["oldest"] >= 89 * 86400
    staging.refresh(site, ["data/x.bin"])
    assert staging.staged(site, needs(wanted))["oldest"] < 60


# ---- what lies there already


def test_files_are_adopted_and_read_once(
    site: SitePaths, wanted: StagedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.scratch / "data").mkdir()
    (site.scratch / "data/x.bin").write_bytes(CONTENT)
    expected = {"files": {"data/x.bin": {"size": 1024, "sha256": wanted.sha256}, "no": None}, "more": False}
    first = staging.adopt(site, ["data/x.bin", "no"])
    assert first["files"]["data/x.bin"].pop("age") < 60
    assert first == expected
    monkeypatch.setattr(staging, "measure", lambda *_: pytest.fail("read again"))
    again = staging.adopt(site, ["data/x.bin", "no"])
    assert again["files"]["data/x.bin"]["sha256"] == wanted.sha256
    staging.staged(site, needs(wanted))


def test_adoption_answers_in_time(site: SitePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (site.scratch / name).write_bytes(name.encode())
    monkeypatch.setattr(staging, "_PATIENCE", -1.0)
    first = staging.adopt(site, ["a", "b"])
    assert (list(first["files"]), first["more"]) == (["a"], True)
    assert staging.adopt(site, ["b"])["more"] is False


def test_pieces_of_production_are_large_enough_for_few_digests() -> None:
    assert 2**40 / pieces.PIECE * 65 < 2 << 20, "digests of a terabyte, as JSON"
