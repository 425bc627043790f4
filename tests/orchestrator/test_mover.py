"""Updates travel whole and verified, or take no part; a closed round arrives after all it speaks of."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from checkpoints.manifest import MANIFEST, Manifest, Piece
from checkpoints.update import Header
from clusters.connection import LocalConnection, Unreachable
from clusters.paths import SitePaths
from clusters.rounds import ClosedRound, Contribution, genesis
from orchestrator.mover import Refused, collect, deliver, sketch

RUN = "run"
PLACE = {"run": RUN, "round": 1, "base": genesis(RUN), "state": False}
VALUES = {"writer-00000.bin": b"abcdefgh", "writer-00001.bin": b"ijkl" * 1000}
NORM = math.sqrt(sum(x * x for data in VALUES.values() for (x,) in struct.iter_unpack("<f", data)))


@dataclass
class Line:
    """A connection to a local site that notes what it carries, and breaks after so many files."""

    scratch: Path
    breaks_after: int = 1_000_000
    carried: list[str] = field(default_factory=list)

    def exchange(self, operations: object, timeout: float = 60.0) -> list[dict[str, object]]:
        raise AssertionError

    def fetch(self, source: str, target: Path) -> int:
        self._note(source)
        return LocalConnection(self.scratch).fetch(source, target)

    def push(self, source: Path, target: str) -> int:
        self._note(target)
        return LocalConnection(self.scratch).push(source, target)

    def _note(self, path: str) -> None:
        if len(self.carried) == self.breaks_after:
            raise Unreachable("the line is cut")
        self.carried.append(path)


def header(site: str = "a", **changes: Any) -> Header:
    facts = {"tokens": 1280, "step": 10, "quantiser": "none", "state": False, "sketch": {}}
    return Header(RUN, site, 1, genesis(RUN), **{**facts, **changes})


def write_update(folder: Path, site: str = "a", values: dict[str, bytes] = VALUES) -> Contribution:
    """An update of one tensor per file, as an island leaves it."""
    pieces = tuple(
        Piece(name, (len(data) // 4,), (0,), (len(data) // 4,), "float32", name, 0, (crc32c(data),))
        for name, data in values.items()
    )
    manifest = Manifest("update", pieces, {n: len(d) for n, d in values.items()}, header(site).to_facts())
    folder.mkdir(parents=True)
    for name, data in values.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_text(manifest.to_json())
    return Contribution(site, 1280, manifest.sha256)


@pytest.fixture
def site(tmp_path: Path) -> Line:
    return Line(tmp_path / "site")


@pytest.fixture
def outbox(site: Line) -> Path:
    return SitePaths(site.scratch).outbox(RUN, 1, "a")


@pytest.fixture
def part(outbox: Path) -> Contribution:
    return write_update(outbox)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home" / "round-000001" / "a"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# ---- collect


def test_an_update_is_brought_home_whole(site: Line, outbox: Path, part: Contribution, home: Path) -> None:
    found = collect(site, part, PLACE, home)
    assert contents(home) == contents(outbox)
    assert found.bytes == sum(map(len, contents(outbox).values()))
    assert found.norm == pytest.approx(NORM)
    assert site.carried[0] == f"outbox/run/round-000001/a/{MANIFEST}"


def test_what_is_here_already_is_not_fetched_again(site: Line, part: Contribution, home: Path) -> None:
    collect(site, part, PLACE, home)
    site.carried.clear()
    found = collect(site, part, PLACE, home)
    assert (found.bytes, found.norm) == (0, pytest.approx(NORM))
    assert site.carried == []


@pytest.mark.parametrize("name", [*VALUES, MANIFEST])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_a_flipped_bit_is_refused(
    site: Line, outbox: Path, part: Contribution, home: Path, name: str, position: int
) -> None:
    flip(outbox / name, position)
    with pytest.raises(Refused, match=r"^a: "):
        collect(site, part, PLACE, home)


@pytest.mark.parametrize("data", [b"", b"abcdefg", b"abcdefghi"], ids=["empty", "shorter", "longer"])
def test_a_file_of_another_size_is_refused(
    site: Line, outbox: Path, part: Contribution, home: Path, data: bytes
) -> None:
    (outbox / "writer-00000.bin").write_bytes(data)
    with pytest.raises(Refused, match=f"writer-00000.bin has {len(data)} bytes, not 8"):
        collect(site, part, PLACE, home)


def test_another_update_than_the_announced_one_is_refused_before_its_files_are_carried(
    site: Line, part: Contribution, home: Path
) -> None:
    announced = Contribution("a", part.tokens, "0" * 64)
    with pytest.raises(Refused, match="not the one its island announced"):
        collect(site, announced, PLACE, home)
    assert len(site.carried) == 1


def test_a_manifest_cannot_lead_out_of_its_folder(site: Line, outbox: Path, home: Path) -> None:
    outbox.mkdir(parents=True)
    text = '{"crc32c":0,"facts":{},"files":{"../../secret":4},"kind":"update","pieces":[]}\n'
    (outbox / MANIFEST).write_text(text)
    with pytest.raises(Refused, match="not a plain file name"):
        collect(site, Contribution("a", 1, "0" * 64), PLACE, home)
    assert len(site.carried) == 1


def test_an_update_that_cannot_be_reached_is_not_refused(
    site: Line, outbox: Path, part: Contribution, home: Path
) -> None:
    (outbox / "writer-00001.bin").unlink()
    with pytest.raises(Unreachable):
        collect(site, part, PLACE, home)


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_fetch_that_was_cut_off_is_done_again(
    site: Line, outbox: Path, part: Contribution, home: Path, files: int
) -> None:
    site.breaks_after = files
    with pytest.raises(Unreachable, match="the line is cut"):
        collect(site, part, PLACE, home)
    (home / "left-over").write_text("of a coordinator that was killed")
    again = Line(site.scratch)
    assert collect(again, part, PLACE, home).bytes > 0
    assert contents(home) == contents(outbox)


def test_a_copy_that_went_bad_here_is_fetched_again(site: Line, part: Contribution, home: Path) -> None:
    collect(site, part, PLACE, home)
    flip(home / "writer-00001.bin", 77)
    assert collect(site, part, PLACE, home).bytes > 0
    assert contents(home)["writer-00001.bin"] == VALUES["writer-00001.bin"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("run", "other"), ("round", 2), ("base", "f" * 64), ("state", True)],
)
def test_an_update_of_another_place_is_refused(
    site: Line, part: Contribution, home: Path, name: str, value: object
) -> None:
    """The island is asked where it should have been, and its header tells something else."""
    place = {**PLACE, name: value}
    outbox = SitePaths(site.scratch).outbox(str(place["run"]), int(str(place["round"])), "a")
    if not outbox.exists():
        write_update(outbox)
    with pytest.raises(Refused, match=f"^a: the update's {name} is "):
        collect(site, part, place, home)


def test_an_update_that_tells_other_tokens_than_its_island_is_refused(
    site: Line, part: Contribution, home: Path
) -> None:
    with pytest.raises(Refused, match=r"^a: the update's tokens is 1280, not 9$"):
        collect(site, Contribution("a", 9, part.sha256), PLACE, home)


def test_an_update_without_a_header_is_refused(site: Line, outbox: Path, home: Path) -> None:
    outbox.mkdir(parents=True)
    manifest = Manifest("update", (), {}, {"round": 1})
    (outbox / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(Refused, match=r"^a: the update's header lacks"):
        collect(site, Contribution("a", 1280, manifest.sha256), PLACE, home)


def test_values_that_are_not_finite_are_told(site: Line, outbox: Path, home: Path) -> None:
    part = write_update(outbox, values={"x.bin": struct.pack("<2f", 1.0, math.nan)})
    assert collect(site, part, PLACE, home).norm == math.inf


def test_the_sketch_is_that_of_the_header(site: Line, part: Contribution, home: Path) -> None:
    collect(site, part, PLACE, home)
    assert sketch(home) == header().sketch


# ---- deliver


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {site: tmp_path / "home" / "round-000001" / site for site in "abc"}


@pytest.fixture
def closed(folders: dict[str, Path]) -> ClosedRound:
    parts = [write_update(folders[site], site, {"x.bin": site.encode() * 8}) for site in "cab"]
    return ClosedRound(RUN, 1, genesis(RUN), tuple(parts))


def test_a_closed_round_arrives_last_and_each_manifest_after_its_files(
    site: Line, closed: ClosedRound, folders: dict[str, Path], tmp_path: Path
) -> None:
    carried = deliver(site, closed, "b", folders, tmp_path / "home" / "new" / "closed.json")
    assert site.carried == [
        "inbox/run/round-000001/a/x.bin",
        "inbox/run/round-000001/a/manifest.json",
        "inbox/run/round-000001/c/x.bin",
        "inbox/run/round-000001/c/manifest.json",
        "rounds/run/round-000001.json",
    ]
    assert carried == sum((site.scratch / path).stat().st_size for path in site.carried)
    paths = SitePaths(site.scratch)
    for other in "ac":
        assert contents(paths.inbox(RUN, 1, other)) == contents(folders[other])
    assert ClosedRound.from_json(paths.closed_round(RUN, 1).read_text()) == closed


def test_an_island_s_own_update_is_not_carried_to_it(
    site: Line, closed: ClosedRound, folders: dict[str, Path], tmp_path: Path
) -> None:
    alone = ClosedRound(RUN, 1, closed.base, tuple(c for c in closed.contributions if c.site == "a"))
    deliver(site, alone, "a", {}, tmp_path / "closed.json")
    assert site.carried == ["rounds/run/round-000001.json"]


def test_a_site_without_a_part_in_the_round_gets_all_of_it(
    site: Line, closed: ClosedRound, folders: dict[str, Path], tmp_path: Path
) -> None:
    deliver(site, closed, "d", folders, tmp_path / "closed.json")
    assert sorted(p.name for p in SitePaths(site.scratch).inbox(RUN, 1, "x").parent.iterdir()) == [
        "a",
        "b",
        "c",
    ]


@pytest.mark.parametrize("files", range(5))
def test_a_delivery_that_was_cut_off_shows_no_closed_round_and_can_be_repeated(
    site: Line, closed: ClosedRound, folders: dict[str, Path], tmp_path: Path, files: int
) -> None:
    site.breaks_after = files
    with pytest.raises(Unreachable):
        deliver(site, closed, "b", folders, tmp_path / "closed.json")
    paths = SitePaths(site.scratch)
    assert not paths.closed_round(RUN, 1).exists()
    for _ in range(2):
        deliver(Line(site.scratch), closed, "b", folders, tmp_path / "closed.json")
    assert ClosedRound.from_json(paths.closed_round(RUN, 1).read_text()) == closed
    assert contents(paths.inbox(RUN, 1, "c")) == contents(folders["c"])
