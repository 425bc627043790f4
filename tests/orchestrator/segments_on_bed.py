"""Segments on two nodes of a test bed's site: real Slurm, Ray, supervisor and guards; the ranks are fake."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from clusters import events
from clusters.ssh import SshConnection
from tests.clusters.site_on_bed import SCRATCH, SiteOnBed, connect
from tests.orchestrator.segments import segment
from tests.testbed.bed import ROOT, Testbed
from tests.testbed.spec import USERS

T = TypeVar("T")
# The bundle's interpreter; a segment whose key begins with "deaf" has ranks that heed no marker.
_PYTHON = f"""#!/bin/sh
export PYTHONPATH={ROOT}:{ROOT}/tests
case "$*" in
  *clusters.guard*) ;;
  *orchestrator.supervisor*/deaf*) set -- "$@" --entry fake_ranks:deaf ;;
  *orchestrator.supervisor*) set -- "$@" --entry fake_ranks:obedient ;;
esac
exec {sys.executable} "$@"
"""


@dataclass
class SegmentOnBed:
    """One segment, as its operator sees it, and as root sees its nodes."""

    site: SegmentsOnBed
    key: str

    def events(self, kind: str) -> list[dict[str, Any]]:
        (told,) = self.site.connection.exchange([{"op": "events", "since": {self.key: {}}}])
        lines = told["events"][self.key].get("supervisor", {}).get("lines", [])
        return [event for event in lines if event["kind"] == kind]

    def started(self, generation: int = 1) -> dict[str, Any]:
        """The event of so many starts of its ranks; they are all at work then."""
        return self._wait(lambda: self.events(events.RANKS_STARTED)[generation - 1 :], "its ranks")[0]

    def environment(self, generation: int, rank: int) -> dict[str, str]:
        name = f"env.{generation}.{rank}"
        text = self._wait(lambda: self.site.read(self.key, f"{name} 2>/dev/null || true"), name)
        found: dict[str, str] = json.loads(text)
        return found

    def touch(self, name: str) -> None:
        self.site.shell(f"touch {SCRATCH}/segments/{self.key}/{name}")

    def end(self, killed: bool = False) -> dict[str, Any]:
        """How the job ended, once it has; nothing of it is left on any node then. Where Slurm may have killed
        the guards as well (3 s after its SIGTERM), directories may be, until the next guard comes."""
        job = self.site.wait(self.key, "ended", 120.0)
        for node in self.site.spec.nodes:
            if killed:
                self._nothing_left(node, besides="/tmp/et-")
                self.site.sweep(node)
            self._nothing_left(node)
        return job

    def _nothing_left(self, node: str, **but: str) -> None:
        """Slurm counts a job as ended a moment before the last process of its other nodes is gone."""
        deadline = time.monotonic() + 15
        while left := self.site.left(node, **but):
            assert time.monotonic() < deadline, f"{node}: {left}"
            time.sleep(0.5)

    @property
    def log(self) -> str:
        return self.site.shell(f"tail -n 20 {SCRATCH}/segments/{self.key}/logs/*.log")

    def _wait(self, look: Callable[[], T], what: str) -> T:
        deadline = time.monotonic() + 150
        while not (found := look()):
            assert time.monotonic() < deadline, f"no sign of {what}: {self.log}"
            assert self.site.job(self.key)["state"] != "ended", f"ended before {what}: {self.log}"
            time.sleep(0.2)
        return found


@dataclass
class SegmentsOnBed(SiteOnBed):
    quiet: dict[str, list[str]] = field(default_factory=dict)  # what a node holds without a segment

    def prepare(self) -> None:
        path = f"{SCRATCH}/python-of-two"
        self.shell(f"mkdir -p {SCRATCH}; cat > {path}; chmod +x {path}", input=_PYTHON, stdin=None)
        self.quiet = {node: self._holds(node) for node in self.spec.nodes}

    @property
    def spec(self) -> Any:
        return next(site for site in self.bed.sites if site.name == self.name)

    def start(self, key: str, nodes: int = 2, after: Sequence[str] = (), **more: Any) -> SegmentOnBed:
        asked = {"nodes": nodes, "gpus_per_node": 2}
        changes = {"layout": {"tp": 2}, **more}
        operation = self.operation(key, after=after, request=asked, **changes)
        operation["python"] = f"{SCRATCH}/python-of-two"
        (answer,) = self.connection.exchange([operation])
        assert answer["ok"], answer
        return SegmentOnBed(self, key)

    def on(self, node: str, *command: str) -> str:
        return self.bed.root(self.name, node, *command, check=False).stdout

    def commands(self, node: str) -> dict[str, str]:
        """The operator's processes on a node, the oldest first: number and command line."""
        rows = self.on(
            node, "ps", "-u", "alice", "-ww", "--sort=start_time,pid", "-o", "pid=,args="
        ).splitlines()
        return dict(row.split(None, 1) for row in rows)

    def kill(self, node: str, *words: str) -> None:
        """SIGKILL for the operator's oldest process whose command line has these words."""
        found = [pid for pid, line in self.commands(node).items() if all(word in line for word in words)]
        self.on(node, "kill", "-9", found[0])

    def sweep(self, node: str) -> None:
        number, program = USERS["alice"], "from clusters.runtimes import sweep; sweep()"
        who = ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups"]
        self.on(node, *who, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", program)

    def left(self, node: str, besides: str = "\n") -> list[str]:
        """What was not there before any segment; after a while, since Slurm ends steps by itself."""
        deadline = time.monotonic() + 20
        while True:
            new = sorted({*self._holds(node)} - {*self.quiet[node]})
            left = [thing for thing in new if besides not in thing]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.3)

    def _holds(self, node: str) -> list[str]:
        """Processes, ports and files of the operator on a node."""
        user = str(USERS["alice"])
        processes = self.commands(node).values()
        ports = self.on(node, "cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
        listening = [row.split()[1] for row in ports if row.split()[3] == "0A" and row.split()[7] == user]
        files = self.on(node, "find", "/tmp", "/dev/shm", "-xdev", "-user", "alice").splitlines()
        return [*processes, *(f"port {port}" for port in listening), *files]


def segments_on(bed: Testbed, name: str, home: Path) -> SegmentsOnBed:
    pattern = segment(Path(SCRATCH), site=name, drain_seconds=20.0)
    connection: SshConnection = connect(bed, name, home)
    site = SegmentsOnBed(bed, name, connection, pattern)
    site.prepare()
    return site
