"""The other nodes of a segment's allocation, as its supervisor holds them: one step of srun on each."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clusters.steps import step
from orchestrator.node import Told

_LEAVE_SECONDS = 15.0  # for a node to end Ray, and for Slurm to end the step


@dataclass(frozen=True)
class Lost:
    """A node that is gone for the segment."""

    host: str  # as Slurm calls it
    reason: str

    def __str__(self) -> str:
        return f"node {self.host} was lost: {self.reason}"


class NodesLost(Exception):
    """The segment cannot go on with the nodes that it has."""

    def __init__(self, nodes: Sequence[Lost]) -> None:
        super().__init__("; ".join(map(str, nodes)))
        self.nodes = tuple(nodes)


class Nodes:
    """The steps by which further nodes join; their standard input is what keeps them."""

    def __init__(self, segment: Path, grace: float) -> None:
        self.segment, self.grace = segment, grace
        self.steps: dict[str, subprocess.Popen[bytes]] = {}

    def join(self, told: Mapping[str, Told]) -> None:
        """Start one step for each node, and tell it what it is to do."""
        for host, what in told.items():
            process = subprocess.Popen(step(host, self._command()), stdin=subprocess.PIPE)
            self.steps[host] = process
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already: `ended` tells
                process.stdin.write(what.to_line())
                process.stdin.flush()

    def ended(self) -> list[Lost]:
        """Nodes whose step is over though nobody asked for its end."""
        codes = {host: process.poll() for host, process in self.steps.items()}
        return [
            Lost(host, f"its step ended ({_how(code)})") for host, code in codes.items() if code is not None
        ]

    def release(self, lost: Collection[str]) -> None:
        """Let all nodes go, and wait until nothing runs there; a lost one cannot be waited for."""
        for process in self.steps.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for host, process in self.steps.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.0 if host in lost else max(0.0, deadline - time.monotonic()))

    def _command(self) -> list[str]:
        """The guard there ends with the step, and the node's part of Ray with the guard."""
        python = [sys.executable, "-P", "-m"]
        options = [f"--grace={self.grace}", "--die-with-parent", "--node", str(self.segment)]
        return [*python, "clusters.guard", *options, "--", *python, "orchestrator.node"]


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
