from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clusters.runtimes import make_runtime, sweep

ROOT = Path(__file__).parents[2]
_HOLDER = """
import os, sys, time
from pathlib import Path
from clusters.runtimes import make_runtime
print(make_runtime(Path(sys.argv[1])), flush=True)
if sys.argv[2] == "fork" and os.fork():
    os._exit(0)
sys.stdin.read()
"""


def holder(parent: Path, how: str) -> tuple[subprocess.Popen[str], Path]:
    words = [sys.executable, "-c", _HOLDER, str(parent), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_runtime_is_its_owners_alone(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path)
    assert oct(runtime.stat().st_mode) == "0o40700"
    assert sweep(tmp_path) == []
    assert runtime.is_dir()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_it_is_kept_while_its_maker_or_a_fork_lives_and_goes_afterwards(tmp_path: Path, how: str) -> None:
    process, runtime = holder(tmp_path, how)
    (runtime / "ray").mkdir()
    if how == "fork":
        process.wait(20)
    assert sweep(tmp_path) == []
    assert process.stdin is not None
    if how == "alone":
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    process.stdin.close()
    assert process.stdout is not None
    process.stdout.read()  # until the last one that could write has ended
    process.stdout.close()
    assert sweep(tmp_path) == [runtime]
    assert not runtime.exists()
    process.wait(20)


def test_what_a_process_started_by_its_maker_holds_is_no_lock(tmp_path: Path) -> None:
    """Ray's own processes may outlive a guard by moments; they hold files, not the directory."""
    runtime = make_runtime(tmp_path)
    script = (
        "import os; print(*(os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')))"
    )
    words = [sys.executable, "-c", script]
    held = subprocess.run(words, capture_output=True, text=True, close_fds=False, check=True)
    assert "/" in held.stdout
    assert str(runtime) not in held.stdout


def test_what_is_not_ours_to_judge_stays(tmp_path: Path) -> None:
    (tmp_path / "et-in-the-making").mkdir()
    (tmp_path / "another").mkdir()
    (tmp_path / "et-link").symlink_to(tmp_path / "another")
    (tmp_path / "another" / "lock").touch()
    (tmp_path / "et-file").touch()
    assert sweep(tmp_path) == []
    assert len([*tmp_path.iterdir()]) == 4


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_another_users_stays(tmp_path: Path) -> None:
    (tmp_path / "et-foreign").mkdir()
    (tmp_path / "et-foreign" / "lock").touch()
    os.chown(tmp_path / "et-foreign", 65534, 65534)
    assert sweep(tmp_path) == []
