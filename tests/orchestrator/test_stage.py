"""`eurotrain stage`: whatever breaks on the way, in the end all is there, verified, little sent twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoints.attempts import by_sha256
from checkpoints.blocks import damages
from checkpoints.manifest import load
from clusters import pieces, staging
from clusters.connection import LocalConnection, Parcel, Unreachable
from clusters.paths import SitePaths
from orchestrator import stock as stock_module
from orchestrator.stage import Listener, Options, Stager, run_files
from orchestrator.stock import Stock
from tests.checkpoints.samples import checkpoint, weights
from tests.clusters.fake_sftp import FakeSftp
from tests.clusters.fake_ssh import FakeSsh
from tests.orchestrator.test_campaign import RUN_TOML

PIECE = 1000
CONTENT = os.urandom(5 * PIECE + 17)
PATHS = ("data/x.bin", "data/x.idx")


class Heard(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.meters: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def meter(self, what: str, done: int, total: int) -> None:
        self.meters.append((what, done, total))


class Flaky(LocalConnection):
    """A site on this machine to which `breaks` gives the bytes after which each transfer breaks off."""

    breaks: list[int]
    carried: list[int]

    def carry(self, parcels: Any, progress: Any, bandwidth: int = 0) -> None:
        before = self.sizes()
        limit = self.breaks.pop(0) if self.breaks else None
        try:
            if limit is None:
                super().carry(parcels, progress, bandwidth)
                return
            for parcel in parcels[:1]:
                with parcel.source.open("rb") as given, (self.scratch / parcel.part).open("ab") as taken:
                    given.seek(parcel.have)
                    taken.write(given.read(limit))
            raise Unreachable("site: ssh: the network is gone")
        finally:
            self.carried.append(sum(self.sizes().values()) - sum(before.values()))

    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in (self.scratch / "incoming").iterdir()}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(source: Path, path: str) -> pieces.StagedFile:
        return pieces.measure(source, path, PIECE)

    monkeypatch.setattr(stock_module, "measure", measure)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where the operator's text lies, with run.toml beside it."""
    (tmp_path / "here/data").mkdir(parents=True)
    for number, path in enumerate(PATHS):
        (tmp_path / "here" / path).write_bytes(CONTENT[number:])
    (tmp_path / "here/run.toml").write_text(RUN_TOML)
    return tmp_path / "here"


@pytest.fixture
def stager(tmp_path: Path) -> Stager:
    (tmp_path / "site").mkdir()
    connection = Flaky(tmp_path / "site")
    object.__setattr__(connection, "breaks", [])
    object.__setattr__(connection, "carried", [])
    return Stager("east", connection, Stock(tmp_path / "staged"), Options(pause=0.0), Heard())


def test_a_run_s_files_are_brought_once(stager: Stager, here: Path, tmp_path: Path) -> None:
    told = run_files(stager, here / "run.toml")
    assert [facts["path"] for facts in told] == list(PATHS)
    assert stager.sent == len(CONTENT) * 2 - 1
    for number, path in enumerate(PATHS):
        assert (tmp_path / "site" / path).read_bytes() == CONTENT[number:]
    run_files(stager, here / "run.toml")
    assert stager.sent == len(CONTENT) * 2 - 1, "nothing is sent again"
    assert [m[1:] for m in stager.listener.meters][-1] == (stager.sent,) * 2  # type: ignore[attr-defined]
    needs = {"files": stager.stock.load("east").contents(PATHS), "advice": ""}
    staging.staged(SitePaths(tmp_path / "site"), needs)


def test_the_checkpoint_that_a_run_begins_with_comes_along(
    stager: Stager, here: Path, tmp_path: Path
) -> None:
    model = checkpoint(here / "models/base", {"w": weights(99)})
    words = f'[start]\ncheckpoint = "models/base"\nsha256 = "{load(model).sha256}"\n'
    (here / "run.toml").write_text(RUN_TOML.replace("[rounds]", f"{words}[rounds]"))
    told = run_files(stager, here / "run.toml")
    assert len(told) == len(PATHS) + 3, "two writers' files and a manifest"
    arrived = by_sha256(tmp_path / "site/models/base", load(model).sha256)
    assert not [*damages(arrived, load(arrived))]
    (here / "models").rename(here / "elsewhere")
    again = run_files(stager, here / "run.toml")
    assert len(again) == len(told), "it is known from before"
    (here / "run.toml").write_text((here / "run.toml").read_text().replace(load(arrived).sha256, "0" * 64))
    with pytest.raises(ValueError, match="has none of sha256 000000000000"):
        run_files(stager, here / "run.toml")


def test_a_transfer_that_breaks_is_gone_on_with(stager: Stager, here: Path) -> None:
    connection: Any = stager.connection
    connection.breaks.extend([1500, 17, 2000])
    run_files(stager, here / "run.toml")
    total = 2 * len(CONTENT) - 1
    assert connection.carried == [1500, 17, 2000, total - 3517], "nothing was sent twice"


def test_a_line_that_carries_nothing_is_given_up(stager: Stager, here: Path) -> None:
    connection: Any = stager.connection
    connection.breaks.extend([100, *[0] * 20])
    with pytest.raises(OSError, match="the network is gone; what has arrived stays there: stage it again"):
        run_files(stager, here / "run.toml")
    assert len(connection.carried) < 8
    connection.breaks.clear()
    run_files(stager, here / "run.toml")
    assert connection.carried[-1] == 2 * len(CONTENT) - 101


def test_a_bit_flipped_on_the_way_is_sent_again(
    stager: Stager, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection: Any = stager.connection
    connection.breaks.append(len(CONTENT))
    original, flipped = Flaky.carry, []

    def carry(self: Flaky, parcels: Any, progress: Any, bandwidth: int = 0) -> None:
        try:
            original(self, parcels, progress, bandwidth)
        finally:
            if not flipped:
                part = self.scratch / parcels[0].part
                content = bytearray(part.read_bytes())
                content[2500] ^= 4
                part.write_bytes(content)
                flipped.append(part)

    monkeypatch.setattr(Flaky, "carry", carry)
    run_files(stager, here / "run.toml")
    assert (tmp_path / "site/data/x.bin").read_bytes() == CONTENT
    assert connection.carried == [len(CONTENT), 2 * len(CONTENT) - 1 - 2 * PIECE], "from its piece on"


def test_a_file_that_changes_under_our_hands_is_told(
    stager: Stager, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Flaky.carry

    def carry(self: Flaky, parcels: list[Parcel], progress: Any, bandwidth: int = 0) -> None:
        original(self, parcels, progress, bandwidth)
        parcels[0].source.write_bytes(b"other")

    monkeypatch.setattr(Flaky, "carry", carry)
    with pytest.raises(ValueError, match=r"x\.bin has changed while it was brought"):
        run_files(stager, here / "run.toml")


def test_other_contents_at_the_site_stay_unless_told(stager: Stager, here: Path, tmp_path: Path) -> None:
    (tmp_path / "site/data").mkdir()
    (tmp_path / "site/data/x.bin").write_bytes(b"another run's")
    with pytest.raises(
        ValueError, match=r"^data/x\.bin at east has other contents; rename it in run.toml, or"
    ):
        run_files(stager, here / "run.toml")
    assert stager.stock.load("east").files == {}
    told = Stager("east", stager.connection, stager.stock, Options(replace=True))
    run_files(told, here / "run.toml")
    assert (tmp_path / "site/data/x.bin").read_bytes() == CONTENT


def test_what_was_purged_is_brought_again_from_where_it_came(
    stager: Stager, here: Path, tmp_path: Path
) -> None:
    run_files(stager, here / "run.toml")
    (tmp_path / "site/data/x.idx").unlink()
    shutil.copy(here / "run.toml", tmp_path / "copy.toml")  # as it lies in the run's folder
    before = stager.sent
    run_files(stager, tmp_path / "copy.toml")
    assert stager.sent - before == len(CONTENT) - 1
    assert (tmp_path / "site/data/x.idx").exists()


def test_what_lies_at_the_site_alone_is_adopted(stager: Stager, here: Path, tmp_path: Path) -> None:
    shutil.move(here / "data", tmp_path / "site/data")
    told = run_files(stager, here / "run.toml")
    assert all(facts["adopted"] for facts in told)
    assert stager.sent == 0
    (tmp_path / "site/data/x.bin").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"x\.bin at east is not what was staged before; --replace takes it"):
        run_files(stager, here / "run.toml")


def test_what_lies_nowhere_is_told(stager: Stager, here: Path) -> None:
    (here / "data/x.idx").unlink()
    with pytest.raises(ValueError, match=r"^data/x\.idx is neither here nor at east; --data tells where"):
        run_files(stager, here / "run.toml")


# ---- room and age


class Limited(Stager):
    """A site that tells of so much room, and has no more of it than that."""

    told: dict[str, Any]

    def ask(self, operation: dict[str, Any]) -> dict[str, Any]:
        return self.told if operation["op"] == "room" else super().ask(operation)


def limited(stager: Stager, **changes: Any) -> Limited:
    free = {
        "free_bytes": 10**9,
        "free_files": None,
        "filesystem": "lustre at /scratch",
        "quotas": [],
        "unknown": "",
    }
    made = Limited(stager.site, stager.connection, stager.stock, stager.options, stager.listener)
    made.told = {**free, **changes}
    return made


@pytest.mark.parametrize(
    ("room", "why"),
    [
        ({"free_bytes": 1024}, r"^east: lustre at /scratch: 9\.8 KiB more are needed, 1 KiB are free$"),
        ({"free_files": 1}, r"^east: lustre at /scratch: 2 more files are needed, 1 are free$"),
        (
            {"quotas": [{"whose": "project 7", "bytes_left": -5, "files_left": None}]},
            r"9\.8 KiB more are needed, 0 B are left to project 7$",
        ),
        (
            {"quotas": [{"whose": "user me", "bytes_left": None, "files_left": 0}]},
            r"2 more files are needed, 0 are left to user me$",
        ),
    ],
)
def test_what_does_not_fit_is_not_begun(stager: Stager, here: Path, room: dict[str, Any], why: str) -> None:
    with pytest.raises(OSError, match=why):
        run_files(limited(stager, **room), here / "run.toml")
    assert stager.connection.carried == []  # type: ignore[attr-defined]


def test_a_disk_that_fills_up_on_the_way_is_told_and_gone_on_with(stager: Stager, here: Path) -> None:
    connection: Any = stager.connection
    connection.breaks.append(3000)
    site = limited(stager)
    asked = iter([10**9, 512])

    def told() -> dict[str, Any]:
        return {**site.told, "free_bytes": next(asked)}

    site.ask = lambda o: told() if o["op"] == "room" else Stager.ask(site, o)  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"6\.87 KiB more are needed, 512 B are free"):
        run_files(site, here / "run.toml")
    run_files(stager, here / "run.toml")
    assert connection.carried == [3000, 2 * len(CONTENT) - 3001]


def test_an_unknown_quota_is_told_once(stager: Stager, here: Path) -> None:
    site = limited(stager, unknown="lfs: not installed")
    stager.connection.breaks.append(10)  # type: ignore[attr-defined]
    run_files(site, here / "run.toml")
    lines: list[str] = stager.listener.lines  # type: ignore[attr-defined]
    assert [line for line in lines if "quota" in line] == [
        "east: lustre at /scratch: whether a quota leaves room is unknown (lfs: not installed)"
    ]


def test_what_is_near_the_age_of_purging_is_made_young(stager: Stager, here: Path, tmp_path: Path) -> None:
    run_files(stager, here / "run.toml")
    file = tmp_path / "site/data/x.bin"
    os.utime(file, (time.time() - 31 * 86400,) * 2)
    run_files(stager, here / "run.toml")
    assert time.time() - file.stat().st_mtime > 30 * 86400, "where nobody purges, nothing is touched"
    stager.old = 30 * 86400.0
    run_files(stager, here / "run.toml")
    assert time.time() - file.stat().st_mtime < 60
    heard: Any = stager.listener
    assert heard.lines[-1:] == ["east: 1 files were near the age of purging: made young again"]
    needs = {"files": stager.stock.load("east").contents(PATHS), "advice": ""}
    staging.staged(SitePaths(tmp_path / "site"), needs)


# ---- the whole command, by ssh


@pytest.fixture
def operator(tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of `eurotrain stage` for a site by ssh."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "sites.toml").write_text(
        f'[east]\ncatalogue = "local"\nhost = "east"\nscratch = "{tmp_path}/site"\naccount = "a"\n'
        f'data_mover = "mover"\npython = "{sys.executable}"\n'
    )
    monkeypatch.setenv("EUROTRAIN_HOME", str(home))
    program = [sys.executable, "-P", "-m", "orchestrator.cli", "stage", "east"]
    return [*program, "--run", str(here / "run.toml")]


def test_killed_in_the_middle_it_goes_on_and_leaves_nobody_behind(
    operator: list[str], here: Path, tmp_path: Path, fake_sftp: FakeSftp
) -> None:
    (here / "data/x.idx").write_bytes(b"")
    fake_sftp.does(stop_after=3000, hang=True)
    process = subprocess.Popen(operator, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        part = wait_for(lambda: [p for p in tmp_path.glob("site/incoming/*") if p.stat().st_size == 3000])
        (carrier,) = children_named(process.pid, "sftp")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not Path(f"/proc/{carrier}").exists())
    assert part[0].stat().st_size == 3000
    fake_sftp.does()
    done = subprocess.run([*operator, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["sent_bytes"] == len(CONTENT) - 3000
    assert (tmp_path / "site/data/x.bin").read_bytes() == CONTENT
    assert fake_sftp.calls[-1]["words"][-1] == "mover"


def children_named(parent: int, name: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) == parent and name in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_an_unchanged_site_costs_three_executions_of_ssh(
    operator: list[str], fake_ssh: FakeSsh, fake_sftp: FakeSftp
) -> None:
    subprocess.run(operator, check=True, capture_output=True)
    before = len(fake_ssh.calls), len(fake_sftp.calls)
    done = subprocess.run([*operator, "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["sent_bytes"] == 0
    assert (len(fake_ssh.calls) - before[0], len(fake_sftp.calls) - before[1]) == (3, 0)


@pytest.mark.parametrize(
    ("more", "code", "why"),
    [
        (["--bwlimit", "fast"], 2, "eurotrain: 'fast' is not a size such as \"8GiB\""),
        (["--data", "/nonexistent"], 2, "does not exist"),
    ],
)
def test_bad_words(operator: list[str], fake_ssh: FakeSsh, more: list[str], code: int, why: str) -> None:
    done = subprocess.run([*operator, *more], capture_output=True, text=True, check=False)
    assert (done.returncode, fake_ssh.calls) == (code, [])
    assert why in done.stderr


def test_a_site_that_refuses_is_told_in_one_line(operator: list[str], fake_ssh: FakeSsh) -> None:
    fake_ssh.does("echo 'alice@east: Permission denied (publickey).' >&2; exit 255")
    done = subprocess.run(operator, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()[-1:]
    assert "Permission denied (publickey).; type `ssh" in line
