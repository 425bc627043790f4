"""The whole product at once: `eurotrain demo` as a person runs it, with a rank killed, a controller killed,
Ctrl-C, and a look at what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.leftovers import Leftovers

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]

EUROTRAIN = str(Path(sys.executable).with_name("eurotrain"))
STEPS = 30  # of each island: two rounds of 15


class Operator:
    """Somebody with a home directory of their own, typing commands."""

    def __init__(self, home: Path, leftovers: Leftovers) -> None:
        self.home = home
        self.leftovers = leftovers
        self.environment = {**os.environ, **leftovers.environment, "EUROTRAIN_HOME": str(home)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [EUROTRAIN, *words]
        with (self.home / "typed.log").open("a") as log:
            how = {"stdout": log, "stderr": log, "env": self.environment}
            return subprocess.Popen(command, text=True, start_new_session=True, **how)

    def read(self, *words: str) -> str:
        command = [EUROTRAIN, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=True)
        return done.stdout

    def ask(self, *words: str) -> Any:
        return json.loads(self.read(*words, "--json"))

    def log(self) -> str:
        return (self.home / "typed.log").read_text()

    def wait_for_training(self, *sites: str, seconds: float = 240.0) -> None:
        """Until every site named has completed two steps."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.leftovers.note()
            steps = self._steps()
            if all(steps.get(site, 0) >= 2 for site in sites):
                return
            time.sleep(0.5)
        raise AssertionError(f"no training within {seconds} s:\n{self.log()[-3000:]}")

    def wait_for_words(self, after: int, seconds: float = 60.0) -> None:
        """Until a command has printed something beyond the log's first `after` characters."""
        deadline = time.monotonic() + seconds
        while len(self.log()) <= after:
            assert time.monotonic() < deadline, "not a word"
            time.sleep(0.1)

    def _steps(self) -> dict[str, int]:
        try:
            return {island["site"]: island["step"] for island in self.ask("status")["islands"]}
        except subprocess.CalledProcessError:  # no run yet
            return {}


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    leftovers = Leftovers()
    yield Operator(tmp_path, leftovers)
    leftovers.kill()


def finish(operator: Operator, process: subprocess.Popen[str], seconds: float = 300) -> int:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        operator.leftovers.note()
        time.sleep(0.5)
    assert process.poll() is not None, operator.log()[-3000:]
    return int(process.returncode)


def test_a_killed_rank_costs_seconds_and_nothing_else(operator: Operator) -> None:
    code = finish(operator, operator.start("demo", "--kill-a-rank", "--steps", str(STEPS)))
    assert code == 0, operator.log()[-3000:]
    (path,) = operator.home.glob("runs/*/summary.json")
    summary = json.loads(path.read_text())
    east, west = summary["islands"]
    assert (east["site"], east["layout"]["tp"], east["ranks"], east["restarts"]) == ("local-a", 2, 2, 0)
    assert (west["site"], west["layout"]["pp"], west["ranks"], west["restarts"]) == ("local-b", 2, 2, 1)
    assert summary["outcome"] == "completed"
    assert summary["loss_last"] < summary["loss_first"] - 0.5
    assert summary["tokens"] == 2 * STEPS * 16 * 128
    assert summary["rounds"] >= STEPS // 15
    per_round = summary["bytes_exchanged"] / summary["rounds"]
    assert 3_000_000 < per_round < 4 * 3_500_000  # int8, two islands at most, in and out again
    assert 0 < summary["recovery_seconds"] < summary["wall_seconds"]
    (fault,) = summary["faults"]
    log = next((operator.home / "runs").glob("*/logs/local-b/*/supervisor.log")).read_text()
    assert str(fault["pid"]) in log, "the supervisor never had the process that was killed"
    check_the_views(operator, summary)
    operator.leftovers.assert_none(within=10)


def check_the_views(operator: Operator, summary: dict[str, Any]) -> None:
    """What other commands show agrees with the summary."""
    status = operator.ask("status")
    assert (status["outcome"], status["tokens"]) == ("completed", summary["tokens"])
    rows = {row["allocation"]: row for row in operator.ask("budget")}
    for island, allocation in zip(summary["islands"], ("demo-a", "demo-b"), strict=True):
        assert rows[allocation]["settled"] == pytest.approx(island["unit_hours"])
        assert rows[allocation]["committed"] == rows[allocation]["burning"] == 0
    assert "supervisor | " in operator.read("logs", "--site", "local-b")
    curves = list(operator.home.glob("runs/*/tensorboard/*/events.out.tfevents.*"))
    assert sorted(p.parent.name for p in curves) == ["all", "local-a", "local-b"]


def test_controller_killed_then_stopped_then_resumed(operator: Operator) -> None:
    """kill -9 of the controller; its successor carries on; Ctrl-C drains; resume finishes the run."""
    first = operator.start("demo", "--steps", str(STEPS))
    operator.wait_for_training("local-a", "local-b")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert operator.ask("status")["outcome"] is None

    told = len(operator.log())
    second = operator.start("resume")
    operator.wait_for_words(after=told)  # before it coordinates, Ctrl-C would only end the command itself
    os.killpg(second.pid, signal.SIGINT)
    assert finish(operator, second) == 0, operator.log()[-3000:]
    stopped = operator.ask("status")
    assert stopped["outcome"] == "stopped", operator.log()[-3000:]
    assert all(i["checkpoint_step"] is not None for i in stopped["islands"])
    operator.leftovers.assert_none(within=10)

    assert finish(operator, operator.start("resume")) == 0, operator.log()[-3000:]
    (path,) = operator.home.glob("runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["outcome"] == "completed"
    assert summary["tokens"] == 2 * STEPS * 16 * 128
    assert [island["segments"] for island in summary["islands"]] == [2, 2]
    claims = list(operator.home.glob("demo/*/segments/*/claim.json"))
    assert len(claims) == 4, "a job ran that no segment accounts for"
    operator.leftovers.assert_none(within=10)
