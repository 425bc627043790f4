"""A checkpoint between two real sites: over real SSH and a WAN that is cut while it travels."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.home import Home
from tests.checkpoints.samples import checkpoint, files, weights
from tests.testbed import demo
from tests.testbed.bed import Testbed
from tests.testbed.spec import SCRATCH

pytestmark = pytest.mark.slurm

FILES = 16  # of 1 MB, a chunk each


@pytest.fixture
def environment(testbed: Testbed, tmp_path: Path) -> Iterator[dict[str, str]]:
    home = Home(tmp_path / "home")
    demo.write_sites(testbed, home)
    with tempfile.TemporaryDirectory(
        dir="/tmp"
    ) as sockets:  # sites of any two test beds have the same addresses
        yield {**demo.environment(testbed, home), "XDG_RUNTIME_DIR": sockets}
        for pid in testbed._sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def start(environment: dict[str, str], *words: object) -> subprocess.Popen[str]:
    eurotrain = [sys.executable, "-P", "-m", "orchestrator.cli", "checkpoint", "replicate"]
    command = [*eurotrain, *map(str, words), "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    told: dict[str, Any] = json.loads(output)
    return told


def received(bed: Testbed, folder: str) -> int:
    """Bytes that have come so far."""
    told = bed.ssh("south", f"du -sk {SCRATCH}/eurotrain/{folder} 2>/dev/null | cut -f1", check=False)
    return 1024 * int(told.stdout or 0)


def test_a_checkpoint_travels_between_sites_though_its_link_is_cut(
    testbed: Testbed, environment: dict[str, str], tmp_path: Path
) -> None:
    tensors = {f"t{n}": weights(250_000, n) for n in range(FILES)}
    source = checkpoint(tmp_path / "here", tensors, writers=FILES)
    testbed.wan({"delay_ms": 10, "rate_mbit": 200})
    try:
        finish(start(environment, source, "north:kept"))
        process = start(environment, "north:kept", "south:kept", "--bwlimit", "2MB/s", "--compress", "never")
        deadline = time.monotonic() + 90
        while received(testbed, "kept") < 3_000_000 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        for pid in testbed._sessions():
            os.kill(pid, signal.SIGKILL)  # all that carries it: the shared sessions to both sites
        told = finish(process)
        assert told["links_lost"] >= 1
        assert told["sent"] + told["reused"] <= told["bytes"] + 2 * 1_000_000, (
            "more than a chunk per stream again"
        )
        again = finish(start(environment, "north:kept", "south:kept"))
        assert (again["already"], again["carried"]) == (True, 0)
        finish(start(environment, "south:kept", tmp_path / "back"))
    finally:
        testbed.wan()
    assert files(tmp_path / "back" / source.name) == files(source)
