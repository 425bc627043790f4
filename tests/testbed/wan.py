"""A router in user space between sites: delay, rate, loss and partition, for kernels without netem.

    python -m tests.testbed.wan WAN.json

One TUN device per end, each in its own network namespace. The file is read again whenever it changes:

    {"mtu": 1500, "default": {...Link...}, "links": {"north>hub": {"down": true}},
     "ends": [{"name": "hub", "pid": 1, "networks": ["10.99.0"]}, ...]}

A link is a direction, "from>to"; a packet waits for those before it, for its own length at the link's
rate, and for the delay; what would wait longer than the queue is dropped at the tail, as routers do.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import selectors
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.testbed.namespaces import enter_network

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_LOOK_SECONDS = 0.02  # how often the file is looked at
_BURST = 64  # packets read from one end before the others get their turn
DEVICE = "wan0"


@dataclass(frozen=True)
class Link:
    """One direction between two ends."""

    delay_ms: float = 10.0
    rate_mbit: float = 1000.0
    loss: float = 0.0  # probability
    queue_ms: float = 200.0
    down: bool = False


@dataclass
class Shaper:
    """When, if ever, a packet arrives. Pure arithmetic: times are given, seconds."""

    default: Link = field(default_factory=Link)
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    random: random.Random = field(default_factory=random.Random)
    _free: dict[tuple[str, str], float] = field(default_factory=dict)

    def configure(self, configuration: dict[str, Any]) -> None:
        """Raises TypeError when a link has an unknown field."""
        default = configuration.get("default", {})
        special = {tuple(k.split(">")): Link(**{**default, **v}) for k, v in configuration["links"].items()}
        self.default, self.links = Link(**default), special

    def arrival(self, now: float, source: str, target: str, size: int) -> float | None:
        """None: the packet is lost."""
        link = self.links.get((source, target), self.default)
        if link.down or (link.loss and self.random.random() < link.loss):
            return None
        start = max(now, self._free.get((source, target), 0.0))
        if (start - now) * 1e3 > link.queue_ms:
            return None
        self._free[source, target] = sent = start + size * 8e-6 / link.rate_mbit
        return sent + link.delay_ms / 1e3


class Router:
    """The devices, the packets on their way, and the file of links."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = path.stat().st_mtime_ns
        self.shaper = Shaper()
        configuration = json.loads(path.read_text())
        self.shaper.configure(configuration)
        self.names: dict[int, str] = {}
        self.routes: dict[str, int] = {}  # network, three bytes as text -> descriptor
        self.flying: list[tuple[float, int, int, bytes]] = []
        self.count = 0
        for end in configuration["ends"]:
            descriptor = _open_device(f"/proc/{end['pid']}/ns/net")
            self.names[descriptor] = end["name"]
            self.routes.update(dict.fromkeys(end["networks"], descriptor))

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        for descriptor in self.names:
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            pause = min(_LOOK_SECONDS, self.flying[0][0] - now) if self.flying else _LOOK_SECONDS
            for key, _ in selector.select(max(0.0, pause)):
                self._receive(key.fd)
            self._deliver()
            self._look()

    def _receive(self, descriptor: int) -> None:
        for _ in range(_BURST):
            try:
                packet = os.read(descriptor, 65535)
            except BlockingIOError:
                return
            target = self.routes.get(".".join(map(str, packet[16:19]))) if packet[0] >> 4 == 4 else None
            if target is None or target == descriptor:
                continue
            ends = self.names[descriptor], self.names[target]
            due = self.shaper.arrival(time.monotonic(), *ends, len(packet))
            if due is not None:
                self.count += 1
                heapq.heappush(self.flying, (due, self.count, target, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self.flying and self.flying[0][0] <= now:
            _, _, target, packet = heapq.heappop(self.flying)
            try:
                os.write(target, packet)
            except OSError:  # the machine at that end is gone, or its queue is full
                continue

    def _look(self) -> None:
        stamp = self.path.stat().st_mtime_ns
        if stamp != self.stamp:
            self.stamp = stamp
            self.shaper.configure(json.loads(self.path.read_text()))


def _open_device(namespace: str) -> int:
    """A TUN device in another network namespace; it vanishes with this process."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    enter_network(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    enter_network(f"/proc/self/fd/{own}")
    os.close(own)
    return descriptor


if __name__ == "__main__":
    Router(Path(sys.argv[1])).run()
