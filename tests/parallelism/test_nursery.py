from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.leftovers import Leftovers

ROOT = Path(__file__).parents[2]


class Nursery:
    """The other end of the protocol."""

    def __init__(self, entry: str, folder: Path, leftovers: Leftovers) -> None:
        self.folder, self.log = folder, folder / "logs" / "rank-0000.log"
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(folder)])
        environment = {**os.environ, **leftovers.environment, "PYTHONPATH": path}
        environment.pop("PYTHONUNBUFFERED", None)  # it would hide what a fork prints twice
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "parallelism.nursery", "--entry", entry],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def ask(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, **env: str) -> int:
        self.ask(start={"env": env, "segment": str(self.folder), "log": str(self.log)})
        return int(self.hear()["started"])


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    watch = Leftovers()
    yield watch
    watch.kill()


@pytest.fixture
def nursery(request: pytest.FixtureRequest, tmp_path: Path, leftovers: Leftovers) -> Iterator[Nursery]:
    """A nursery that is ready to start the entry named by the test's parameter."""
    nursery = Nursery(f"fake_ranks:{request.param}", tmp_path, leftovers)
    assert nursery.hear()["threads"] == 1
    yield nursery
    assert nursery.process.stdin is not None
    assert nursery.process.stdout is not None
    nursery.process.stdin.close()
    nursery.process.wait(10)
    nursery.process.stdout.close()
    leftovers.assert_none()


def wait_until(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} has not appeared"
        time.sleep(0.01)


@pytest.mark.parametrize("nursery", ["environment"], indirect=True)
def test_a_rank_gets_its_environment_its_group_and_its_log(nursery: Nursery) -> None:
    first = nursery.start(RANK="3")
    ended = nursery.hear()
    assert ended["ended"] == first
    assert (ended["exit_code"], ended["signal"]) == (7, None)
    assert abs(ended["time"] - time.time()) < 5
    facts = json.loads((nursery.folder / "facts.json").read_text())
    assert facts["argument"] == str(nursery.folder)
    assert (facts["env"]["RANK"], facts["env"]["OMP_NUM_THREADS"]) == ("3", "1")
    assert facts["group"] == facts["pid"] == first
    assert facts["descriptors"] == ["/dev/null", str(nursery.log), str(nursery.log)]
    nursery.start()
    assert nursery.hear()["exit_code"] == 7
    assert nursery.log.read_text() == "a line on standard output\n" * 2


@pytest.mark.parametrize(
    ("nursery", "told"),
    [("crash", "RuntimeError: the reason for the crash"), ("leave", "a message instead of a code")],
    indirect=["nursery"],
)
def test_an_exception_is_logged_and_gives_1(nursery: Nursery, told: str) -> None:
    nursery.start()
    assert nursery.hear()["exit_code"] == 1
    assert told in nursery.log.read_text()


@pytest.mark.parametrize("nursery", ["family"], indirect=True)
def test_kill_reaches_the_whole_group_and_is_told_when_all_are_gone(nursery: Nursery) -> None:
    rank = nursery.start()
    wait_until(nursery.folder / "ready")  # it has outlived SIGTERM and SIGINT
    asked = time.monotonic()
    nursery.ask(kill=True)
    ended = nursery.hear()
    assert time.monotonic() - asked < 1
    assert (ended["ended"], ended["exit_code"], ended["signal"]) == (rank, None, signal.SIGKILL)
    child = int((nursery.folder / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("nursery", ["family"], indirect=True)
def test_a_rank_that_ends_by_itself_takes_its_children_along(nursery: Nursery, leftovers: Leftovers) -> None:
    nursery.start()
    wait_until(nursery.folder / "ready")
    (nursery.folder / "go").touch()
    assert nursery.hear()["exit_code"] == 0
    assert [p.pid for p in leftovers.processes()] == [nursery.process.pid]


@pytest.mark.parametrize("nursery", ["family"], indirect=True)
def test_a_kill_with_no_rank_is_no_error(nursery: Nursery) -> None:
    nursery.ask(kill=True)
    nursery.start()
    wait_until(nursery.folder / "ready")
    nursery.ask(kill=True)
    assert nursery.hear()["signal"] == signal.SIGKILL
    nursery.ask(kill=True)
    (nursery.folder / "ready").unlink()
    nursery.start()
    wait_until(nursery.folder / "ready")


@pytest.mark.parametrize("end", ["input ends", "killed"])
def test_the_rank_does_not_outlive_the_nursery(end: str, tmp_path: Path, leftovers: Leftovers) -> None:
    nursery = Nursery("fake_ranks:family", tmp_path, leftovers)
    with nursery.process:
        nursery.hear()
        nursery.start()
        wait_until(tmp_path / "ready")
        if end == "killed":
            nursery.process.kill()
            psutil.Process(int((tmp_path / "child").read_text())).kill()  # its slot's task, not the kernel's
    leftovers.assert_none(within=2)


def test_prints_of_imports_do_not_disturb_the_protocol(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "chatty.py").write_text(
        "import os\nprint('hello')\nos.write(1, b'{}')\ndef main(_): return 0\n"
    )
    nursery = Nursery("chatty:main", tmp_path, leftovers)
    with nursery.process:
        assert nursery.hear()["threads"] == 1
        nursery.start()
        assert nursery.hear()["exit_code"] == 0
    assert nursery.log.read_text() == "", "printed by the nursery, so not by the rank"


def test_an_entry_that_cannot_be_imported_ends_the_nursery(tmp_path: Path, leftovers: Leftovers) -> None:
    nursery = Nursery("no_such_module:main", tmp_path, leftovers)
    with nursery.process:
        assert nursery.process.stdout is not None
        assert nursery.process.stdout.read() == b""
    assert nursery.process.returncode == 1


def test_a_misspelt_entry_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parallelism.nursery", "--entry", "json"]
    end = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
    assert "ValueError: --entry json: must be MODULE:FUNCTION" in end.stderr


def test_torch_computes_rightly_in_a_fork(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "trained.py").write_text("import torch\nfrom fake_ranks import multiply as main\n")
    nursery = Nursery("trained:main", tmp_path, leftovers)
    with nursery.process:
        assert nursery.hear()["threads"] == 1
        for _ in range(2):
            nursery.start()
            assert nursery.hear()["exit_code"] == 0, nursery.log.read_text()


@pytest.mark.ranks
@pytest.mark.skipif(importlib.util.find_spec("parallelism.rank") is None, reason="there is no rank yet")
def test_the_real_rank_is_forked_from_one_thread_that_touched_no_device(
    tmp_path: Path, leftovers: Leftovers
) -> None:
    nursery = Nursery("parallelism.rank:main", tmp_path, leftovers)
    with nursery.process:
        assert nursery.hear()["threads"] == 1
        before = time.monotonic()
        nursery.start(RANK="0", WORLD_SIZE="1")
        assert nursery.hear()["exit_code"] == 1  # there is no segment.json
        assert time.monotonic() - before < 1
        assert "FileNotFoundError" in nursery.log.read_text()
