"""Which node keeps what for which, and what happens where one cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkpoints.channel import connect
from checkpoints.fast import open_tier
from clusters.paths import SegmentPaths
from parallelism import peers
from parallelism.peers import Peers

NODES = 3


class Seat:
    """A rank's Control, where the ranks are threads of this process."""

    def __init__(self, rank: int, paths: SegmentPaths, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.paths, self.leads = rank, paths, rank == 0
        self._barrier, self._table = barrier, table

    def gather(self, mine: Any) -> list[Any]:
        self._table[self.rank] = mine
        self._barrier.wait(60)
        found = [*self._table]
        self._barrier.wait(60)
        return found

    def from_leader(self, look: Callable[[], Any]) -> Any:
        return self.gather(look() if self.leads else None)[0]


@pytest.fixture
def tiers(tmp_path: Path) -> list[Path]:
    for number in range(NODES):
        (tmp_path / str(number)).mkdir()
    return [open_tier(str(tmp_path / str(number)), "run", "a") for number in range(NODES)]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """Ranks, each alone on its node. A keeper ends with the thread that started it."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor(NODES) as made:
        yield made


def meet(
    pool: ThreadPoolExecutor, directory: Path, tiers: list[Path | None], wanted: bool = True
) -> list[Peers]:
    barrier, table = threading.Barrier(len(tiers)), [None] * len(tiers)
    seats: list[Any] = [Seat(n, SegmentPaths(directory), barrier, table) for n in range(len(tiers))]
    return [*pool.map(lambda seat: Peers(seat, tiers[seat.rank], wanted), seats)]


def keepers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "checkpoints.keeper" in p.cmdline()]


def test_nodes_form_a_ring_and_each_hears_what_the_others_have(
    pool: ThreadPoolExecutor, tmp_path: Path, tiers: list[Path]
) -> None:
    (tiers[1] / "a.0001").mkdir()
    (tiers[1] / "a.0001" / "writer-00000.bin").write_bytes(b"zero")
    ring = meet(pool, tmp_path, [*tiers])
    assert len({member.neighbour for member in ring}) == len(keepers()) == NODES
    assert None not in {member.neighbour for member in ring}
    assert ring[1].copies("a.0001") == ring[0].copies("b.0001") == [], "no node asks itself"
    (served,) = ring[2].copies("a.0001")
    assert served.has("writer-00000.bin")
    assert not served.has("writer-00001.bin")
    found = bytearray(5)
    assert served.fill("writer-00000.bin", 1, memoryview(found)) == 3
    assert found == b"ero\0\0"
    assert ring[0].neighbour is not None
    assert str(served.directory) == f"127.0.0.1:{ring[0].neighbour.port}/a.0001", "0's neighbour is node 1"
    for member in ring:
        member.close()
    assert keepers() == []
    assert [*tmp_path.glob("?/*")] == [], "the nodes are not as they were found"


def test_a_node_without_a_place_keeps_nothing(
    pool: ThreadPoolExecutor, tmp_path: Path, tiers: list[Path]
) -> None:
    ring = meet(pool, tmp_path, [tiers[0], None, tiers[2]])
    assert [member.neighbour is None for member in ring] == [True, False, False]
    for member in ring:
        member.close()


def test_a_keeper_that_cannot_start_is_told_and_done_without(
    pool: ThreadPoolExecutor,
    tmp_path: Path,
    tiers: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(peers.sys, "executable", "/bin/false")
    ring = meet(pool, tmp_path, [*tiers])
    assert [member.neighbour for member in ring] == [None] * NODES
    assert capsys.readouterr().err.count("nothing is kept for other nodes here: its keeper did not") == NODES
    for member in ring:
        member.close()


def test_without_a_token_there_are_no_peers(
    pool: ThreadPoolExecutor, tmp_path: Path, tiers: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ring = meet(pool, tmp_path / "nowhere", [*tiers])
    assert [member.neighbour for member in ring] == [None] * NODES
    assert "checkpoint.peers is not used: " in capsys.readouterr().err
    assert keepers() == []


@pytest.mark.parametrize(("nodes", "wanted"), [(1, True), (2, False)])
def test_one_node_has_no_peers_nor_has_who_wants_none(
    pool: ThreadPoolExecutor, tmp_path: Path, tiers: list[Path], nodes: int, wanted: bool
) -> None:
    ring = meet(pool, tmp_path, [*tiers[:nodes]], wanted)
    assert [member.neighbour for member in ring] == [None] * nodes
    assert keepers() == []
    assert [*tmp_path.glob("*.token")] == []


def test_each_incarnation_has_a_token_of_its_own(
    pool: ThreadPoolExecutor, tmp_path: Path, tiers: list[Path]
) -> None:
    old = meet(pool, tmp_path, [*tiers])
    new = meet(pool, tmp_path, [*tiers])
    (token,) = tmp_path.glob("peers-*.token")
    assert {member.neighbour.token for member in new if member.neighbour} == {str(token)}
    assert new[0].neighbour is not None
    connect(new[0].neighbour).close()
    for member in (*old, *new):
        member.close()
