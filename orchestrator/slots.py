"""The island's slots, one per rank, in a Ray of the segment's own on the nodes of its allocation.

Ray starts the slots on the nodes that Slurm's order gives them, and tells when one of them, or its node, is
lost; what a rank did is told by the process that waited for it. The only module that imports ray. Ray reads
its configuration from the environment when it is imported: `orchestrator.supervisor` sets that first.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestrator.address import own_address
from orchestrator.node import Told
from orchestrator.nodes import Lost, Nodes, NodesLost
from orchestrator.rank_logs import rank_log
from orchestrator.runtime import OBJECT_STORE
from orchestrator.slot import GONE_WITHIN, Slot
from orchestrator.watch import End, Place

JOIN_SECONDS = 120.0  # from the step's start until a node must have joined: it imports ray from a busy disk
_JOIN_TICK = 0.1
_PLACE = "rank@"  # and a node's name: Ray's resource of which each rank there takes one
# The autoscaler's monitor, the forwarder of logs to the driver and the head of the usage statistics: Ray has
# no option against them, and misses none of them. Together 155 MB (PSS) and 0.5 s of CPU time per minute.
_USELESS = ("autoscaler/_private/monitor.py", "_private/log_monitor.py", "dashboard/dashboard.py")


class Slots:
    """The island's slots as its supervisor sees them. Ranks are numbered as the slots are.

    `hosts`: the allocation's nodes in Slurm's order, this one first; each gets as many ranks as any other,
    neighbours in rank order. Every method that waits raises NodesLost when one of the nodes is gone.
    """

    def __init__(self, ranks: int, hosts: Sequence[str], directory: Path, nodes: Nodes, entry: str) -> None:
        if ranks % len(hosts):
            raise ValueError(f"{ranks} ranks do not lie evenly on the job's {len(hosts)} nodes")
        each = ranks // len(hosts)
        self.hosts = [host for host in hosts for _ in range(each)]  # by rank
        self.nodes, self.entry = nodes, entry
        token = (directory / "token").read_text()
        address = own_address(os.environ, hosts[1]) if len(hosts) > 1 else "127.0.0.1"
        head = start_ray(address, {_PLACE + hosts[0]: each}, directory)
        nodes.join({host: Told(head, token, _PLACE + host, each) for host in hosts[1:]})
        self.joining = time.monotonic()
        self.members: dict[str, str] = {}  # host by Ray's name for the node
        self.addresses: dict[str, str] = {}  # by host, as soon as it has joined
        self.actors: list[Any] = [None] * ranks
        self.places: list[Place | None] = [None] * ranks  # what prepare() told; None: not ready
        self.nurseries, self.pids = [0] * ranks, [0] * ranks
        self.preparing: dict[Any, int] = {}
        self.running: dict[Any, int] = {}

    @property
    def ready(self) -> bool:
        return all(self.places)

    def prepare(self, seconds: float) -> list[End]:
        """Prepare the slots that are not ready, and wait up to so many seconds; those that failed."""
        self.check_nodes()
        for rank, host in enumerate(self.hosts):
            if host not in self.addresses:
                seconds = _JOIN_TICK
            elif self.places[rank] is None and rank not in self.preparing.values():
                if self.actors[rank] is None:
                    self.actors[rank] = self._create(rank)
                self.preparing[self.actors[rank].prepare.remote()] = rank
        failed = []
        for ref in _finished(self.preparing, seconds):
            rank = self.preparing.pop(ref)
            found, problem = _result(ref)
            if problem is None:
                self.nurseries[rank] = found.pop("nursery")
                self.places[rank] = Place(self.addresses[self.hosts[rank]], **found)
            else:
                failed.append(self._lose(rank, problem))
        return failed

    def start(self, environments: Sequence[dict[str, str]], segment: Path) -> list[End]:
        """Start all ranks (`pids`); those that failed. Afterwards the slots are to be prepared again."""
        started = [
            actor.start.remote(env, str(segment))
            for actor, env in zip(self.actors, environments, strict=True)
        ]
        self.places = [None] * len(self.actors)
        failed = []
        for rank, ref in enumerate(started):
            pid, problem = _result(ref)
            self.pids[rank] = pid or 0
            if problem is None:
                self.running[self.actors[rank].ended.remote()] = rank
            else:
                failed.append(self._lose(rank, problem))
        return failed

    def ends(self, seconds: float) -> list[End]:
        """Ranks that ended: as soon as one does, at the latest after so many seconds."""
        self.check_nodes()
        return sorted((self._end(ref) for ref in _finished(self.running, seconds)), key=lambda end: end.time)

    def kill(self) -> list[End]:
        """Kill all ranks at once, and wait until they are gone; how they ended. Those of a lost slot are
        waited for when it is prepared again. Raises RuntimeError when a process survives."""
        for actor in filter(None, self.actors):
            actor.kill.remote()
        deadline = time.monotonic() + 2 * GONE_WITHIN
        ends = []
        while self.running and time.monotonic() < deadline:
            ends += [self._end(ref) for ref in _finished(self.running, 1.0)]
        if self.running:
            raise RuntimeError(f"ranks {sorted(self.running.values())} do not end though killed")
        return ends

    def check_nodes(self) -> None:
        """Admit the nodes that have joined. Raises NodesLost for those that are gone, or did not come."""
        lost = {node.host: node for node in self.nodes.ended()}
        for node in ray.nodes():
            host = self.members.get(node["NodeID"]) or _host(node["Resources"])
            if not node["Alive"] and host:
                reason = node.get("DeathReasonMessage") or "it does not answer"
                lost[host] = Lost(host, f"Ray: {' '.join(reason.split())}")
            elif host:
                self.members[node["NodeID"]], self.addresses[host] = host, node["NodeManagerAddress"]
        if time.monotonic() > self.joining + JOIN_SECONDS:
            late = f"it has not joined within {JOIN_SECONDS:.0f} s"
            lost = {host: Lost(host, late) for host in self.hosts if host not in self.addresses} | lost
        if lost:
            raise NodesLost([*lost.values()])

    def close(self, lost: Sequence[str] = ()) -> None:
        """End Ray on all nodes; of those that are lost nothing is waited for."""
        ray.shutdown()
        self.nodes.release(lost)

    def _create(self, rank: int) -> Any:
        host = self.hosts[rank]
        options = {"num_cpus": 0, "resources": {_PLACE + host: 1}}
        log = rank_log(self.nodes.segment / "logs", rank)
        predecessors = [pid for pid in (self.nurseries[rank], self.pids[rank]) if pid]
        return (
            ray.remote(Slot)
            .options(**options)
            .remote(self.entry, str(log), self.addresses[host], predecessors)
        )

    def _end(self, ref: Any) -> End:
        rank = self.running.pop(ref)
        found, problem = _result(ref)
        return End(rank, **found) if problem is None else self._lose(rank, problem)

    def _lose(self, rank: int, problem: Exception) -> End:
        """A call failed: because of the nursery, which the slot replaces, or with the slot itself."""
        if not isinstance(problem, ray.exceptions.RayTaskError):
            self.actors[rank] = None
        lines = str(problem).strip().splitlines() or [repr(problem)]
        return End(rank, self.pids[rank], None, None, time.time(), f"was lost: {lines[-1]}")


def start_ray(address: str, places: Mapping[str, int], directory: Path) -> str:
    """Start Ray on this node, for this segment alone; ADDRESS:PORT of its head.

    Ranks are a resource of their own rather than CPUs, since they may outnumber the cores.
    """
    ray.init(
        num_cpus=0,
        num_gpus=0,
        resources=dict(places),
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address=address,
        _temp_dir=str(directory / "ray"),
    )
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.endswith(_USELESS) for word in process.cmdline()):
                process.kill()
    return str(ray.get_runtime_context().gcs_address)


def _host(resources: Mapping[str, float]) -> str | None:
    """The node that brings these resources to Ray."""
    return next((name.removeprefix(_PLACE) for name in resources if name.startswith(_PLACE)), None)


def _finished(refs: Mapping[Any, int], seconds: float) -> list[Any]:
    """Those with a result: as soon as there is one, at the latest after so many seconds."""
    if not refs:  # what ray would not wait for
        time.sleep(seconds)
        return []
    done, _ = ray.wait([*refs], timeout=seconds)
    if done:
        done, _ = ray.wait([*refs], num_returns=len(refs), timeout=0.0)
    return list(done)


def _result(ref: Any) -> tuple[Any, Exception | None]:
    try:
        return ray.get(ref), None
    except ray.exceptions.RayError as problem:
        return None, problem
