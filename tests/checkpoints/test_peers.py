"""Copies on another node: they arrive, outlive their node, and cost nothing but themselves."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from checkpoints import channel, keeper
from checkpoints.attempts import Retention
from checkpoints.channel import Channel, Peer, Refused, admit, connect, make_token
from checkpoints.fast import KEPT, open_tier
from checkpoints.image import Place
from checkpoints.keeper import Keeper
from checkpoints.manifest import Damaged
from checkpoints.peers import Caller, Sender, Served, send
from checkpoints.reader import Reader, Shard
from checkpoints.saver import Saver
from checkpoints.writer import Commit, Order, work
from tests.checkpoints.saving import ROWS, WIDE, State, attempt_of, save, wait_until

FILE = "writer-00000.bin"
HOST = "127.0.0.1"


@pytest.fixture
def tiers(tmp_path: Path) -> list[Path]:
    """Of two nodes."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    return [open_tier(str(tmp_path / name), "run", "a") for name in ("0", "1")]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    make_token(tmp_path / "token")
    return tmp_path / "token"


@pytest.fixture
def peer(tiers: list[Path], token: Path) -> Iterator[Peer]:
    """The second node's keeper."""
    with Keeper(tiers[1], token.read_bytes(), HOST) as made:
        serving = threading.Thread(target=made.serve_forever, args=(0.01,))
        serving.start()
        yield Peer(HOST, made.server_address[1], str(token))
        made.shutdown()
        serving.join()


@pytest.fixture
def deaf(token: Path) -> Iterator[tuple[Peer, socket.socket]]:
    """A keeper that takes connections, and hangs."""
    with socket.create_server((HOST, 0)) as listening:
        yield Peer(HOST, listening.getsockname()[1], str(token)), listening


@pytest.fixture
def file(tiers: list[Path]) -> Path:
    """A copy on the first node: more than one part is sent."""
    path = tiers[0] / "step-00000003.0001" / FILE
    path.parent.mkdir()
    path.write_bytes(os.urandom(channel.PART + 5000))
    return path


def sent(peer: Peer, file: Path) -> None:
    with file.open("rb") as stream:
        send(peer, stream)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def replicated(tmp_path: Path, tiers: list[Path], peer: Peer) -> Path:
    """A checkpoint, once its file has a copy on both nodes."""
    saver = Saver(0, "this one", WIDE, fast=tiers[0], neighbour=peer)
    try:
        save(saver, tmp_path / "site", State(), 3)
        assert [outcome.problem for outcome in saver.finish()] == [None]
        attempt = attempt_of(tmp_path / "site", 3)
        wait_until((tiers[1] / attempt.name / FILE).exists, "no copy has arrived")
    finally:
        saver.close()
    return attempt


def read(attempt: Path, tier: Path, peer: Peer) -> tuple[Reader, torch.Tensor]:
    """As a rank on the first node does."""
    caller = Caller(peer)
    reader = Reader(attempt, [tier / attempt.name, Served(caller, attempt.name, [FILE])])
    found = torch.empty(ROWS)
    try:
        reader.read(Shard("w", (ROWS,), (0,), found))
    finally:
        caller.close()
    return reader, found


def test_a_copy_outlives_its_node(tmp_path: Path, tiers: list[Path], peer: Peer) -> None:
    attempt = replicated(tmp_path, tiers, peer)
    copies = [place / attempt.name / FILE for place in tiers]
    assert copies[0].read_bytes() == copies[1].read_bytes() == (attempt / FILE).read_bytes()
    shutil.rmtree(tiers[0])
    flip(attempt / FILE)  # so that nothing else can serve
    reader, found = read(attempt, tiers[0], peer)
    assert bool((found == 3).all())
    assert reader.bad_copies == {}


def test_a_damaged_copy_is_named_and_the_sites_file_serves(
    tmp_path: Path, tiers: list[Path], peer: Peer
) -> None:
    attempt = replicated(tmp_path, tiers, peer)
    shutil.rmtree(tiers[0])
    flip(tiers[1] / attempt.name / FILE)
    reader, found = read(attempt, tiers[0], peer)
    assert bool((found == 3).all())
    (damage,) = reader.bad_copies.values()
    assert str(damage).startswith(f"{HOST}:{peer.port}/{attempt.name}: {FILE}: bytes 0 to ")
    flip(attempt / FILE)
    with pytest.raises(Damaged, match="crc32c"):
        read(attempt, tiers[0], peer)


def test_a_copy_that_is_gone_or_short_is_not_waited_for(
    tmp_path: Path, tiers: list[Path], peer: Peer
) -> None:
    attempt = replicated(tmp_path, tiers, peer)
    shutil.rmtree(tiers[0])
    os.truncate(tiers[1] / attempt.name / FILE, 100)
    reader, found = read(attempt, tiers[0], peer)
    assert bool((found == 3).all())
    assert "ends after byte 100" in str(*reader.bad_copies.values())
    shutil.rmtree(tiers[1] / attempt.name)
    reader, found = read(attempt, tiers[0], peer)
    assert bool((found == 3).all())
    assert "cannot be read: FileNotFoundError" in str(*reader.bad_copies.values())


def test_the_token_is_the_users_alone(token: Path) -> None:
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_bytes()) == 64
    with pytest.raises(FileExistsError):
        make_token(token)


def test_a_caller_with_another_token_is_refused(
    tmp_path: Path, tiers: list[Path], peer: Peer, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_token(tmp_path / "other")
    stranger = Peer(peer.host, peer.port, str(tmp_path / "other"))
    with pytest.raises(ConnectionResetError):
        sent(stranger, file)
    with pytest.raises(ConnectionResetError):
        Caller(stranger).fill(file.parent.name, FILE, 0, memoryview(bytearray(5)))
    assert list(tiers[1].iterdir()) == []
    wait_until(lambda: "a caller does not have the segment's token" in capfd.readouterr().err, "not told")


def test_an_empty_token_opens_nothing(tmp_path: Path, peer: Peer) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(PermissionError, match="cut short"):
        connect(Peer(peer.host, peer.port, str(tmp_path / "empty")))


def test_a_keeper_with_another_token_is_not_believed(deaf: tuple[Peer, socket.socket]) -> None:
    peer, listening = deaf

    def pretend() -> None:
        connection, _ = listening.accept()
        with connection:
            Channel(connection).send(bytes(32))
            Channel(connection).bytes(64)
            Channel(connection).send(bytes(32))

    pretending = threading.Thread(target=pretend)
    pretending.start()
    with pytest.raises(PermissionError, match="does not have the segment's token"):
        connect(peer)
    pretending.join()


def test_a_neighbour_that_hangs_delays_no_commit(
    tmp_path: Path,
    tiers: list[Path],
    deaf: tuple[Peer, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It hangs for longer than the test may take; what waits for it in vain is told."""
    monkeypatch.setattr(channel, "SILENCE_SECONDS", WIDE)
    peer, listening = deaf
    sender, image, place = Sender(), memoryview(bytes(4096)), Place("w", (1,), (0,), (1,), "float32", 0)
    for step in (1, 2, 3):
        commit = Commit(1, {"step": step}, WIDE, Retention())
        order = Order(attempt_of(tmp_path / "site", step), "x", 0, [place], commit, tiers[0], peer)
        assert work(order, image, None, lambda: None, sender)["bytes"] == 4
        if step == 1:
            first, _ = listening.accept()  # it is under way as long as this is open
    said = "step-00000002.0001/writer-00000.bin on a neighbour: the one before it takes"
    assert said in capfd.readouterr().err
    first.close()


def test_a_hanging_keeper_is_asked_once(
    deaf: tuple[Peer, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.05)
    peer, listening = deaf
    caller = Caller(peer)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            caller.fill("a.0001", FILE, 0, memoryview(bytearray(5)))
    listening.accept()[0].close()
    listening.settimeout(0.0)
    with pytest.raises(BlockingIOError):
        listening.accept()


def test_a_neighbour_that_dies_midway_is_told(
    deaf: tuple[Peer, socket.socket], token: Path, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    peer, listening = deaf
    Sender().offer(peer, file)
    connection, _ = listening.accept()
    with connection:
        midway = Channel(connection)
        admit(midway, token.read_bytes())
        assert midway.message() == {"keep": file.parent.name, "file": FILE, "size": file.stat().st_size}
        midway.tell(ready=True)
    said = f"no copy of {file} on a neighbour: {HOST}:{peer.port}: "
    wait_until(lambda: said in capfd.readouterr().err, "not told")


def test_what_arrives_in_part_or_changed_is_not_kept(tiers: list[Path], peer: Peer) -> None:
    with closing(connect(peer)) as broken:
        broken.tell(keep="a.0001", file=FILE, size=5000)
        broken.message()
        broken.send(bytes(4999))
        assert [path.suffix for path in tiers[1].glob("a.0001/.*")] == [".part"]
    wait_until(lambda: not [*tiers[1].iterdir()], "the part is still there")
    with closing(connect(peer)) as changed:
        changed.tell(keep="a.0001", file=FILE, size=5000)
        changed.message()
        changed.send(bytes(5004))
        with pytest.raises(Refused, match="not what was sent"):
            changed.message()
    assert list(tiers[1].iterdir()) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"keep": "../a", "file": FILE, "size": 5},
        {"keep": "a.0001", "file": "../../x", "size": 5},
        {"keep": "a.0001", "file": FILE, "size": -1},
        {"read": ".", "file": FILE, "size": 5, "position": 0},
        {"read": "a.0001", "file": FILE, "size": 1 << 40, "position": 0},
        {"read": "a.0001", "file": FILE, "size": 5},
        {"read": "a.0001", "size": 5, "position": 0},
        {"else": 1},
    ],
)
def test_what_is_no_copy_is_refused_and_the_next_is_served(
    tiers: list[Path], peer: Peer, file: Path, asked: dict[str, object]
) -> None:
    with closing(connect(peer)) as asking:
        asking.tell(**asked)
        with pytest.raises(Refused):
            asking.message()
    sent(peer, file)
    assert [path.name for path in tiers[1].iterdir()] == [file.parent.name]


def test_noise_instead_of_a_message_costs_one_connection(tiers: list[Path], peer: Peer, file: Path) -> None:
    with closing(connect(peer)) as noisy:
        noisy.send(b"\xff" * 64)
        with pytest.raises(ConnectionResetError):
            noisy.message()
    sent(peer, file)
    assert (tiers[1] / file.parent.name / FILE).read_bytes() == file.read_bytes()


def test_few_are_kept_and_the_same_is_not_sent_twice(tiers: list[Path], peer: Peer, file: Path) -> None:
    names = [file.parent.name, "step-00000004.0001", "step-00000005.0001"]
    sent(peer, file)
    with pytest.raises(Refused, match="it is here already"):
        sent(peer, file)
    for name in names[1:]:
        file = file.parent.rename(file.parent.with_name(name)) / FILE
        sent(peer, file)
    assert sorted(path.name for path in tiers[1].iterdir()) == names[-KEPT:]


def test_no_room_is_told_before_anything_is_sent(
    peer: Peer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(Refused, match=r"1 bytes are free in .*, not 4199304"):
        sent(peer, file)


def test_a_new_keeper_removes_what_the_one_before_had_begun(tiers: list[Path]) -> None:
    (tiers[1] / "a.0001").mkdir()
    (tiers[1] / "a.0001" / f".{FILE}.x.part").touch()
    (tiers[1] / "a.0001" / FILE).touch()
    Keeper(tiers[1], bytes(32), HOST).server_close()
    assert [path.name for path in tiers[1].glob("a.0001/*")] == [FILE]
