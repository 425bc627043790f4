"""Processes as /proc tells of them: the living, the dead, and the dead that nobody has buried."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from clusters.processes import process


def test_a_living_process_has_a_parent_and_a_start() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = process(child.pid)
        assert found is not None
        assert (found.pid, found.parent) == (child.pid, os.getpid())
        assert abs(found.started - psutil.Process(child.pid).create_time()) < 1.5
        assert process(child.pid) == found, "its start does not change"
        child.kill()


def test_the_dead_are_dead_whether_buried_or_not() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        child.kill()
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        assert process(child.pid) is None
        child.wait()
        assert process(child.pid) is None


def test_a_name_full_of_brackets_and_blanks_is_no_trouble(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "600"]) as child:
        while Path(f"/proc/{child.pid}/comm").read_text().strip() != program.name:
            time.sleep(0.001)
        found = process(child.pid)
        assert found is not None
        assert found.parent == os.getpid()
        child.kill()
