"""A copy between processes is the copy within one; a link may end at any byte."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from checkpoints.attempts import survey
from checkpoints.manifest import Damaged, load
from checkpoints.replication import remote, transfer
from checkpoints.replication.compression import Garbled
from checkpoints.replication.flat import FlatSource
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.remote import Peer, RemoteSource, RemoteTarget, as_error, from_error
from checkpoints.replication.transfer import Options, Outcome, replicate
from checkpoints.replication.wire import Lost
from tests.checkpoints.samples import checkpoint, files, flip, weights

LARGEST = 100_000
# what `head -c` would be, if it did not keep back what it has not filled a block with
PASS = """
import os, sys
left = int(sys.argv[1])
while left and (data := os.read(0, left)):
    os.write(1, data)
    left -= len(data)
"""
PEER = [sys.executable, "-P", "-m", remote.MODULE]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "here", {f"t{n}": weights(9_000 + 500 * n, n) for n in range(24)})


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PAUSE", 0.0)


def here() -> list[str]:
    return PEER


def through(
    source: Path, target: Path, start: remote.Start = here, streams: int = 2, relay: bool = False
) -> Outcome:
    options = Options(streams, "always", LARGEST)
    origin = partial(RemoteSource, start, str(source)) if relay else partial(FlatSource, source)
    return replicate(
        partial(origin, largest=LARGEST), partial(RemoteTarget, start, str(target), largest=LARGEST), options
    )


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("relay", [False, True])
def test_a_copy_through_processes_is_the_checkpoint(source: Path, tmp_path: Path, relay: bool) -> None:
    before = children()
    outcome = through(source.parent, tmp_path / "there", streams=1 if relay else 2, relay=relay)
    assert files(Path(outcome.where)) == files(source)
    assert outcome.carried < 0.9 * outcome.bytes
    assert children() == before, "processes are left behind"
    again = through(source.parent, tmp_path / "there", streams=1)
    assert (again.already, again.carried) == (True, 0)


def test_what_a_login_shell_prints_does_no_harm(source: Path, tmp_path: Path) -> None:
    chatty = lambda: ["sh", "-c", f"echo Welcome; echo; {' '.join(PEER)}"]  # noqa: E731
    assert files(Path(through(source, tmp_path / "there", chatty, 1).where)) == files(source)


def test_a_link_cut_after_any_number_of_bytes_is_opened_again(source: Path, tmp_path: Path) -> None:
    """Both directions end at a byte: as when ssh is killed."""
    limits = iter([3, 40, 20_000, 90_000, 300_000])  # bytes to the far end

    def cut() -> list[str]:
        limit = next(limits, None)
        return (
            PEER
            if limit is None
            else ["sh", "-c", f"{sys.executable} -Sc '{PASS}' {limit} | {' '.join(PEER)}"]
        )

    outcome = None
    while outcome is None:
        try:
            outcome = through(source, tmp_path / "there", cut, streams=1)
        except OSError as error:
            assert isinstance(error, Lost), error  # noqa: PT017 - the first link must hold until it has begun
            assert survey(tmp_path / "there").intact == []
    assert files(Path(outcome.where)) == files(source)


def test_a_far_end_killed_at_work_is_started_again(source: Path, tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    kept = subprocess.Popen

    class Watched(kept):  # type: ignore[type-arg, misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    left = [3]

    def tell(outcome: Outcome) -> None:
        if left[0] and outcome.sent > outcome.bytes * (4 - left[0]) / 5:
            left[0] -= 1
            started[-1].send_signal(signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote.subprocess, "Popen", Watched)
        outcome = replicate(
            partial(FlatSource, source, largest=LARGEST),
            partial(RemoteTarget, here, str(tmp_path / "there"), largest=LARGEST),
            Options(1, "never", LARGEST),
            tell,
        )
    assert outcome.relinked == 3
    assert outcome.sent <= outcome.bytes + 3 * LARGEST
    assert files(Path(outcome.where)) == files(source)


@pytest.mark.parametrize(
    ("words", "why", "kind"),
    [
        (["sh", "-c", "echo 'sh: 1: python4: not found' >&2; exit 127"], "python4: not found", OSError),
        (["sh", "-c", "echo 'ssh: connect to host x: No route' >&2; exit 255"], "No route", Lost),
        ([sys.executable, "-P", "-m", "checkpoints.absent"], "No module named checkpoints.absent", OSError),
        (["sh", "-c", "yes | head -c 2000000"], "the other side greets with", OSError),
        (["true"], "the other side has ended", Lost),
    ],
)
def test_a_far_end_that_does_not_start_says_why(words: list[str], why: str, kind: type[OSError]) -> None:
    with pytest.raises(OSError, match=why) as caught:
        Peer(lambda: words)
    assert type(caught.value) is kind


def test_a_far_end_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_START", 0.2)
    monkeypatch.setattr(remote, "_END", 0.1)
    before = children()
    with pytest.raises(Lost, match="nothing moved for 0 s"):
        Peer(lambda: ["sleep", "60"])
    assert children() == before


def test_errors_of_the_far_end_are_raised_here(source: Path, tmp_path: Path) -> None:
    flip(source / "writer-00000.bin", 5)
    with pytest.raises(Damaged, match=r"writer-00000.bin: bytes 0 to 36000 have crc32c"):
        through(source, tmp_path / "there", relay=True)
    with pytest.raises(ValueError, match="absent: no such directory"):
        RemoteSource(here, str(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as caught:
        through(checkpoint(tmp_path / "more", {"t": weights(9)}), tmp_path / "file" / "there")
    assert caught.value.errno == errno.ENOTDIR


def test_a_full_disk_over_there_is_one_clear_error_and_what_came_is_kept(
    source: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a quota: both fail in the middle of a write."""
    size = min(load(source).files.values())
    small = f"ulimit -f {size // 2 // 512}; {' '.join(PEER)}"  # in blocks of 512 bytes
    ignoring = lambda: ["sh", "-c", f"trap '' XFSZ; {small}"]  # noqa: E731
    with pytest.raises(OSError, match="File too large"):
        through(source, tmp_path / "there", ignoring)
    assert survey(tmp_path / "there").intact == []


def test_errors_travel() -> None:
    for error in (
        Damaged(Path("/x"), "rotten"),
        ValueError("bad"),
        Garbled("noise"),
        OSError(28, "full", "/y"),
    ):
        found = as_error(from_error(error))
        assert type(found) is type(error)
        assert str(error.args[-1] if isinstance(error, OSError) else error) in str(found)
    broken = as_error(from_error(BrokenPipeError(32, "Broken pipe")))
    assert not isinstance(broken, ConnectionError), "a pipe that broke over there is no lost link"


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer(here)
    yield found
    found.close()


def test_the_far_end_ends_with_its_link(peer: Peer) -> None:
    pid = peer._process.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
    peer.close()
    peer.close()
    assert peer._process.returncode == 0


def test_the_far_end_ends_when_nothing_is_asked(tmp_path: Path) -> None:
    idle = "import checkpoints.replication.peer as p; p.IDLE = 0.2; p.main()"
    peer = Peer(lambda: [sys.executable, "-P", "-c", idle])
    deadline = time.monotonic() + 20
    while peer._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert peer._process.returncode == 0
    peer.close()


def test_both_ends_of_one_machine_are_the_same_target(source: Path, tmp_path: Path) -> None:
    """A stream of a copy may be local and another remote: they meet in one directory."""
    ends = iter([partial(FlatTarget, tmp_path / "there", largest=LARGEST)])
    far = partial(RemoteTarget, here, str(tmp_path / "there"), largest=LARGEST)
    outcome = replicate(
        partial(FlatSource, source, largest=LARGEST), lambda: next(ends, far)(), Options(2, "auto", LARGEST)
    )
    assert files(Path(outcome.where)) == files(source)
