"""One more node of a segment's Ray: `python -P -m orchestrator.node`, started by the supervisor through srun.

It is told what to do by one line of JSON on standard input, the token included, so that nothing of it shows
anywhere. That input is also its lifeline: when it ends, or at a SIGTERM, Ray here ends as soon as nobody
answers at the head any more (a scancel cuts the lifeline at once, while the supervisor still lets the ranks
save); unasked, when nobody has answered for half a minute. The guard that this runs under (`--node`) then
leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clusters.guard import RUNTIME
from orchestrator.address import own_address
from orchestrator.runtime import OBJECT_STORE, configure_ray

_TICK = 1.0  # seconds
SILENCE_SECONDS = 30.0  # a head that is silent for so long has ended, or this node is cut off
_ANSWER_SECONDS = 2.0  # for the head, on a network that may lose a packet


@dataclass(frozen=True)
class Told:
    """What a node is told: where the head is, and what it brings."""

    head: str  # ADDRESS:PORT
    token: str
    resource: str  # Ray's name for a place on this node
    ranks: int

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def main() -> int:
    """Until Ray has ended here; its exit code. Raises ValueError when there is no address for the head."""
    told = Told(**json.loads(_first_line()))
    runtime = Path(os.environ[RUNTIME])
    address = own_address(os.environ, told.head.rpartition(":")[0])
    configure_ray(runtime, told.token)
    with without_stop_signals():
        ray = subprocess.Popen(command(told, address, runtime), stdin=subprocess.DEVNULL)
    return watch(ray, told.head)


def _first_line() -> bytes:
    """Without a buffer, which could hide from `watch` that the input has ended."""
    line = b""
    while not line.endswith(b"\n"):
        block = os.read(0, 1 << 16)
        if not block:
            raise ValueError("the supervisor has told this node nothing")
        line += block
    return line


def command(told: Told, address: str, runtime: Path) -> list[str]:
    """Ray's own command line, which ends when its raylet does (`--block`)."""
    options: Mapping[str, Any] = {
        "address": told.head,
        "node-ip-address": address,
        "temp-dir": runtime / "ray",
        "num-cpus": 0,
        "num-gpus": 0,
        "resources": json.dumps({told.resource: told.ranks}),
        "object-store-memory": OBJECT_STORE,
        "min-worker-port": 0,  # any, as on the head; Ray's own range may be another job's too
        "max-worker-port": 0,
        "include-log-monitor": "false",
        "log-style": "record",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--disable-usage-stats", "--block"]


class without_stop_signals:  # noqa: N801 - read as a statement
    """What is started meanwhile never hears of SIGTERM: Slurm sends it to every process of a job, but a Ray
    that heeds it takes the ranks along before they could save. Our own comes when this is over."""

    def __enter__(self) -> None:
        self.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


def watch(ray: subprocess.Popen[bytes], head: str) -> int:
    """Until Ray has ended by itself, or is no longer wanted: as soon as nobody answers at the head where this
    node is told to end, else when nobody has answered for a while."""
    asked: list[int] = []
    heard = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    lifeline = [0]
    while ray.poll() is None:
        ended, _, _ = select.select(lifeline, [], [], _TICK)
        if ended and not os.read(0, 1 << 10):
            lifeline = []
        if answers(head):
            heard = time.monotonic()
        elif asked or not lifeline or time.monotonic() > heard + SILENCE_SECONDS:
            return 0
    return ray.returncode


def answers(head: str) -> bool:
    """Whether somebody listens there."""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
