from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusters import guard
from clusters.paths import SegmentPaths
from tests.leftovers import Leftovers

ROOT = Path(__file__).parents[2]

# A command that leaves a daemon behind which has fled its parent, its session and its process group.
DAEMONISES = """
import os, sys, time, pathlib
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        pathlib.Path("daemon").write_text(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
while not pathlib.Path("daemon").exists(): time.sleep(0.01)
"""
WAITS = "pathlib.Path('ready').touch(); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
POLITE = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"


class Segment:
    """A guard around a small Python program in a segment's directory."""

    def __init__(self, root: Path) -> None:
        self.paths, self.leftovers = SegmentPaths(root), Leftovers()
        self.processes: list[subprocess.Popen[bytes]] = []

    def guard(self, script: str, *options: str, **popen: Any) -> subprocess.Popen[bytes]:
        command = [*options, str(self.paths.root), "--", sys.executable, "-c", script]
        return self.start([sys.executable, "-m", "clusters.guard", *command], **popen)

    def start(self, command: list[str], **popen: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self.leftovers.environment, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=self.paths.root, env=environment, **popen)
        self.processes.append(process)
        return process

    def wait_for(self, name: str) -> Path:
        path, deadline = self.paths.root / name, time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < deadline, f"{name} has not appeared"
            time.sleep(0.01)
        self.leftovers.note()
        return path

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.paths.exit.read_text())
        return found

    @property
    def log(self) -> str:
        return (self.paths.logs / "supervisor.log").read_text()


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[Segment]:
    segment = Segment(tmp_path)
    yield segment
    try:
        segment.leftovers.assert_none()
    finally:
        segment.leftovers.kill()
        for process in segment.processes:
            process.wait(5)


@pytest.mark.parametrize(
    ("script", "exit_code", "outcome"),
    [
        ("print('done')", 0, "completed"),
        ("import sys; sys.exit(5)", 5, "failed"),
        ("import os; os.kill(os.getpid(), 11)", 128 + 11, "failed"),
        (DAEMONISES, 0, "completed"),
    ],
)
def test_the_end_of_the_command_is_recorded(
    segment: Segment, script: str, exit_code: int, outcome: str
) -> None:
    before = time.time()
    assert segment.guard(script).wait(10) == exit_code
    assert segment.record["outcome"] == outcome
    assert segment.record["exit_code"] == exit_code
    assert before <= segment.record["start"] <= segment.record["end"] <= time.time()
    assert segment.leftovers.processes() == []


def test_the_command_is_told_its_runtime_directory_and_its_start(segment: Segment) -> None:
    script = "import os; r = os.environ['EUROTRAIN_RUNTIME']; open(r + '/file', 'w').close()\n"
    script += (
        "print(oct(os.stat(r).st_mode), r, os.environ['EUROTRAIN_STARTED'], os.getsid(0) == os.getpid())"
    )
    assert segment.guard(script).wait(10) == 0
    mode, runtime, started, own_session = segment.log.split()
    assert mode == "0o40700"
    assert len(runtime) <= 47, "Ray's sockets would not fit"
    assert not Path(runtime).exists()
    assert float(started) == segment.record["start"]
    assert own_session == "True"


def test_a_command_that_is_not_there_is_named(segment: Segment) -> None:
    command = [sys.executable, "-m", "clusters.guard", str(segment.paths.root), "--", "no-such-program"]
    assert segment.start(command).wait(10) == 127
    assert segment.log == "no-such-program: No such file or directory\n"
    assert segment.record["outcome"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_the_command_to_end(segment: Segment, number: int) -> None:
    process = segment.guard("import sys, time, pathlib\n" + POLITE + WAITS)
    segment.wait_for("ready")
    process.send_signal(number)
    assert process.wait(5) == 0
    assert segment.record["outcome"] == "cancelled"


def test_ctrl_c_in_the_terminal_reaches_the_command_once(segment: Segment) -> None:
    counts = "signal.signal(signal.SIGINT, lambda *_: sys.exit(9))\n"
    script = "import sys, time, pathlib\n" + POLITE + counts + WAITS
    process = segment.guard(script, start_new_session=True)
    segment.wait_for("ready")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(5) == 0


def test_after_the_grace_everything_is_killed(segment: Segment) -> None:
    process = segment.guard("import time, pathlib\n" + DEAF + DAEMONISES + WAITS, "--grace", "0.3")
    segment.wait_for("ready")
    asked = time.monotonic()
    process.terminate()
    assert process.wait(5) == 128 + 9
    assert 0.3 <= time.monotonic() - asked < 2
    assert segment.record["outcome"] == "cancelled"


def test_a_second_signal_ends_the_grace(segment: Segment) -> None:
    process = segment.guard("import time, pathlib\n" + DEAF + WAITS)
    segment.wait_for("ready")
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.terminate()
    assert process.wait(2) == 128 + 9


@pytest.mark.parametrize(("manners", "exit_code"), [(POLITE, 0), (DEAF, 128 + 9)])
def test_the_time_limit(segment: Segment, manners: str, exit_code: int) -> None:
    limits = ("--time-limit", "1", "--grace", "0.3")
    process = segment.guard("import sys, time, pathlib\n" + manners + WAITS, *limits)
    segment.wait_for("ready")
    assert process.wait(5) == exit_code
    assert segment.record["outcome"] == "timeout"
    assert 1 <= segment.record["end"] - segment.record["start"] < 3


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_if_the_guard_is_killed_nothing_is_left_and_the_end_is_recorded(
    segment: Segment, kill: Callable[[int, int], None]
) -> None:
    process = segment.guard("import time, pathlib\n" + DEAF + DAEMONISES + WAITS, start_new_session=True)
    segment.wait_for("ready")
    kill(process.pid, signal.SIGKILL)
    assert segment.leftovers.assert_none(within=3) < 3
    assert segment.record["outcome"] == "failed"
    assert segment.record["exit_code"] == 128 + 9


def test_the_command_dies_with_the_guard_at_once(segment: Segment) -> None:
    """By the kernel, not by the janitor: it is killed first."""
    process = segment.guard("import time, pathlib\n" + DEAF + WAITS)
    segment.wait_for("ready")
    janitor = next(
        p
        for p in segment.leftovers.processes()
        if "clusters.guard" in p.cmdline() and p.ppid() == process.pid
    )
    janitor.suspend()
    process.kill()
    deadline = time.monotonic() + 1
    while segment.leftovers.processes() != [janitor]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    janitor.resume()


def test_the_guard_dies_with_its_parent_where_asked(segment: Segment) -> None:
    guard_command = [
        sys.executable,
        "-m",
        "clusters.guard",
        "--die-with-parent",
        str(segment.paths.root),
        "--",
    ]
    script = "import sys, time, pathlib\n" + POLITE + WAITS
    parent = f"import subprocess; subprocess.run({[*guard_command, sys.executable, '-c', script]!r})"
    process = segment.start([sys.executable, "-c", parent])
    segment.wait_for("ready")
    process.kill()
    segment.leftovers.assert_none(within=3)
    assert segment.record["outcome"] == "cancelled"


def test_without_being_asked_the_guard_outlives_its_parent(segment: Segment) -> None:
    guard_command = [
        sys.executable,
        "-m",
        "clusters.guard",
        str(segment.paths.root),
        "--",
        sys.executable,
        "-c",
    ]
    script = "import time, pathlib\npathlib.Path('ready').touch()\n"
    script += "while not pathlib.Path('go').exists(): time.sleep(.01)"
    process = segment.start(
        [sys.executable, "-c", f"import subprocess; subprocess.run({[*guard_command, script]!r})"]
    )
    segment.wait_for("ready")
    process.kill()
    process.wait()
    (segment.paths.root / "go").touch()
    segment.leftovers.assert_none()
    assert segment.record["outcome"] == "completed"


def test_a_second_incarnation_does_not_tell_the_end_of_the_first(segment: Segment) -> None:
    segment.paths.claim.write_text(json.dumps({"runtime": "/tmp/et-of-the-first"}))
    assert segment.guard("import sys; sys.exit(3)").wait(10) == 3
    assert not segment.paths.exit.exists()


def test_its_own_claim_is_no_hindrance(segment: Segment) -> None:
    script = "import json, os; own = {'runtime': os.environ['EUROTRAIN_RUNTIME']}\n"
    script += "open('claim.json', 'w').write(json.dumps(own))"
    assert segment.guard(script).wait(10) == 0
    assert segment.record["outcome"] == "completed"


@pytest.mark.parametrize(
    "words", [["here"], ["here", "--"], ["here", "--time-limit", "soon", "--", "true"], ["--", "true"]]
)
def test_a_bad_command_line_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        guard.main(words)
    assert end.value.code == 2
    assert "clusters.guard: error: " in capsys.readouterr().err


def test_options_of_the_command_are_its_own(segment: Segment) -> None:
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "--", "--time-limit", "0"]
    line = [
        sys.executable,
        "-m",
        "clusters.guard",
        str(segment.paths.root),
        "--time-limit",
        "60",
        "--",
        *command,
    ]
    assert segment.start(line).wait(10) == 0
    assert segment.log == "['--', '--time-limit', '0']\n"
