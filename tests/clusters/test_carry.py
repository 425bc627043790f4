"""Lanes of sftp: what each carries, how far it is, by whose connection, and what it says when it breaks."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import carry
from clusters.carry import Lane, lanes
from clusters.connection import LocalConnection, Parcel, Unreachable
from clusters.ssh import SshConnection
from tests.clusters.fake_sftp import FakeSftp

CONTENT = bytes(range(256)) * 100


@pytest.fixture
def parcels(tmp_path: Path) -> list[Parcel]:
    """Three files, of which 1,000 bytes are at the site."""
    (tmp_path / "scratch/incoming").mkdir(parents=True)
    made = []
    for number in range(3):
        source = tmp_path / f"source {number}"
        source.write_bytes(CONTENT)
        (tmp_path / f"scratch/incoming/{number}.part").write_bytes(CONTENT[:1000])
        made.append(Parcel(source, f"incoming/{number}.part", 1000, len(CONTENT)))
    return made


def site(tmp_path: Path, carrier: str = "") -> SshConnection:
    return SshConnection(
        "site", str(tmp_path / "scratch"), tmp_path / "home", sys.executable, carrier=carrier
    )


def arrived(tmp_path: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((tmp_path / "scratch/incoming").iterdir())]


def test_a_local_site_gets_the_rest(tmp_path: Path, parcels: list[Parcel]) -> None:
    told: list[int] = []
    LocalConnection(tmp_path / "scratch").carry(parcels, told.append)
    assert arrived(tmp_path) == [CONTENT] * 3
    assert told == sorted(told)
    assert told[-1] == 3 * (len(CONTENT) - 1000)


def test_a_local_site_without_room(tmp_path: Path, parcels: list[Parcel]) -> None:
    with pytest.raises(Unreachable, match=r"cannot copy .*source 0.*: .*No such file"):
        LocalConnection(tmp_path / "none").carry(parcels, lambda _: None)


def test_every_lane_is_one_execution(tmp_path: Path, parcels: list[Parcel], fake_sftp: FakeSftp) -> None:
    site(tmp_path).carry(parcels, lambda _: None)
    assert arrived(tmp_path) == [CONTENT] * 3
    assert len(fake_sftp.calls) == 3
    assert all(call["words"][-1] == "site" for call in fake_sftp.calls)
    assert not any("-l" in call["words"] for call in fake_sftp.calls)


def test_files_go_by_the_data_mover_and_nothing_else_does(
    tmp_path: Path, parcels: list[Parcel], fake_sftp: FakeSftp
) -> None:
    connection = site(tmp_path, carrier="mover")
    assert connection.exchange([]) == []
    connection.carry(parcels, lambda _: None)
    assert {call["words"][-1] for call in fake_sftp.calls} == {"mover"}
    told = {name: (tmp_path / f"home/ssh/{name}.json").exists() for name in ("site", "mover")}
    assert told == {"site": True, "mover": True}, "each has a budget of its own"


def test_updates_of_rounds_go_by_the_data_mover_and_are_gone_on_with(
    tmp_path: Path, fake_sftp: FakeSftp
) -> None:
    """Files of more than 256 KiB, both ways; small ones travel within an exchange."""
    connection, content = site(tmp_path, carrier="mover"), CONTENT * 20
    (tmp_path / "update").write_bytes(content)
    fake_sftp.does(stop_after=300_000, error="Connection closed")
    with pytest.raises(Unreachable, match="mover: sftp: Connection closed"):
        connection.push(tmp_path / "update", "inbox/update")
    fake_sftp.does()
    assert connection.push(tmp_path / "update", "inbox/update") == len(content)
    fake_sftp.does(stop_after=300_000, error="Connection closed")
    with pytest.raises(Unreachable, match="mover: sftp: Connection closed"):
        connection.fetch("inbox/update", tmp_path / "back/update")
    fake_sftp.does()
    connection.fetch("inbox/update", tmp_path / "back/update")
    assert (
        (tmp_path / "back/update").read_bytes() == (tmp_path / "scratch/inbox/update").read_bytes() == content
    )
    assert [call["words"][-1] for call in fake_sftp.calls] == ["mover"] * 4
    sizes = [size for call in fake_sftp.calls for _, _, size in call["puts"]]
    assert sizes == [300_000, len(content)] * 2


def test_the_lanes_share_the_bandwidth(tmp_path: Path, parcels: list[Parcel], fake_sftp: FakeSftp) -> None:
    site(tmp_path).carry(parcels, lambda _: None, bandwidth=3_000_000)
    limits = [call["words"][call["words"].index("-l") + 1] for call in fake_sftp.calls]
    assert limits == ["8000"] * 3, "kbit/s: a third of 24,000"


def test_what_sftp_says_is_told_and_what_arrived_stays(
    tmp_path: Path, parcels: list[Parcel], fake_sftp: FakeSftp
) -> None:
    fake_sftp.does(stop_after=5000, error='write remote "x": Failure')
    with pytest.raises(Unreachable, match=r'^site: sftp: write remote "x": Failure$'):
        site(tmp_path).carry(parcels, lambda _: None)
    assert arrived(tmp_path) == [CONTENT[:6000]] * 3


def test_the_other_lanes_wait_for_the_connection_that_the_first_opens() -> None:
    """All at once would open one each: some sites take that for an attack."""
    running: Future[None] = Future()
    asked = iter([False, False, True])
    session = SimpleNamespace(is_live=lambda: next(asked))
    carry._wait_until_shared(session, {running})  # type: ignore[arg-type]
    assert next(asked, None) is None, "it waited until the session was there"
    running.set_result(None)
    carry._wait_until_shared(SimpleNamespace(is_live=lambda: False), {running})  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1), st.integers(1, 6))
def test_every_file_has_one_lane_and_no_lane_is_idle(sizes: list[tuple[int, int]], count: int) -> None:
    parcels = [Parcel(Path(str(n)), "", have, have + rest) for n, (have, rest) in enumerate(sizes)]
    made = lanes(parcels, count)
    assert sorted(p.source for lane in made for p in lane.parcels) == sorted(p.source for p in parcels)
    assert len(made) == min(count, len(parcels))
    if any(lane.size for lane in made):
        loads = sorted(lane.size for lane in made)
        assert loads[-1] - loads[0] <= max(rest for _, rest in sizes), "greedy: one file's difference at most"


def test_how_far_a_lane_is_the_kernel_knows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(CONTENT)
    lane = Lane([Parcel(tmp_path / name, "", 600, len(CONTENT)) for name in ("a", "b")])
    assert lane.done() == 0, "it has not started"
    program = "import sys; f = open(sys.argv[1], 'rb', 0); f.seek(1000); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "b")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        lane.pid = process.pid
        assert lane.done() == (len(CONTENT) - 600) + 400
        process.communicate()
    assert lane.done() == (len(CONTENT) - 600) + 400, "what was seen last"
