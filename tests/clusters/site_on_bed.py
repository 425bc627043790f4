"""A site of the test bed as its operator works with it: segments of a stand-in, exchanges, counts."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.segment import Segment
from clusters.ssh import SshConnection
from tests.testbed.bed import ROOT, Testbed

SCRATCH = "/srv/scratch/eurotrain"
# The bundle's interpreter: submitit and the guard are the real ones, the supervisor a stand-in.
_PYTHON = f"""#!/bin/sh
export PYTHONPATH={ROOT}
python={sys.executable}
for last; do :; done
case "$*" in
  *-m\\ clusters.guard*) ;;
  *orchestrator.supervisor*) exec $python -m tests.clusters.stand_in_supervisor "$last" ;;
esac
exec $python "$@"
"""


@dataclass
class SiteOnBed:
    bed: Testbed
    name: str
    connection: SshConnection
    segment: Segment  # a pattern

    def prepare(self) -> None:
        self.shell(
            f"mkdir -p {SCRATCH}; cat > {SCRATCH}/python; chmod +x {SCRATCH}/python",
            input=_PYTHON,
            stdin=None,
        )

    def shell(self, command: str, **popen: Any) -> str:
        return self.bed.ssh(self.name, command, **popen).stdout

    def operation(
        self,
        key: str,
        seconds: int = 1,
        after: Sequence[str] = (),
        request: dict[str, Any] | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """To submit a segment that takes so many seconds."""
        training = dataclasses.replace(self.segment.training, steps=seconds)
        segment = dataclasses.replace(
            self.segment,
            key=key,
            scratch=SCRATCH,
            training=training,
            **{"time_limit_seconds": 300.0, **changes},
        )
        asked = {"account": "proj", "after": list(after), **(request or {})}
        return {"op": "submit", "scheduler": "slurm", "segment": segment.to_json(), "request": asked,
                "python": f"{SCRATCH}/python"}  # fmt: skip

    def submit(self, key: str, seconds: int = 1, **more: Any) -> dict[str, Any]:
        (result,) = self.connection.exchange([self.operation(key, seconds, **more)])
        return result

    def job(self, key: str) -> dict[str, Any]:
        (result,) = self.connection.exchange([{"op": "jobs", "scheduler": "slurm", "keys": [key]}])
        assert result["ok"], result
        found: dict[str, Any] = result["jobs"][key]
        return found

    def wait(self, key: str, state: str, seconds: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (job := self.job(key))["state"] != state:
            assert time.monotonic() < deadline, job
            time.sleep(0.3)
        return job

    def read(self, key: str, name: str) -> str:
        return self.shell(f"cat {SCRATCH}/segments/{key}/{name}")

    def facts(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.read(key, "facts.json"))
        return found

    @property
    def session_pid(self) -> int:
        """The process that holds the shared session."""
        (pid,) = self.bed._sessions()
        return pid

    def jobs_named(self, key: str, user: str = "alice") -> list[str]:
        """Numbers of all jobs that Slurm ever had under a name."""
        told = self.shell(f"squeue --states=all -h -u {user} -n {key} -o %i")
        return told.split()

    @property
    def sshd_log(self) -> str:
        return (self.bed.directory / self.name / "log" / "sshd.log").read_text()

    @property
    def executions(self) -> int:
        return self.sshd_log.count("Starting session: command for alice")

    @property
    def connections(self) -> int:
        return self.sshd_log.count("Connection from 10.99.0.1")


def connect(bed: Testbed, name: str, home: Path) -> SshConnection:
    return SshConnection(name, SCRATCH, home, config=bed.ssh_config)
