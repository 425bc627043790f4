"""Ray inside one allocation: one slot per rank, which starts, watches and kills it through a nursery.

Ray places the slots and tells when one of them, or its node, is lost; what a rank did is told by the process
that waited for it. The only module that imports ray. Ray reads its configuration from the environment when
it is imported: `orchestrator.supervisor` sets that first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.watch import End

GONE_WITHIN = 10.0  # seconds from SIGKILL until a process must have left the process table
_OBJECT_STORE = 80 << 20  # bytes: nothing goes through it, and Ray accepts no less than 75 MiB
# The autoscaler's monitor, the forwarder of logs to the driver and the head of the usage statistics: Ray has
# no option against them, and misses none of them. Together 155 MB (PSS) and 0.5 s of CPU time per minute.
_USELESS = ("autoscaler/_private/monitor.py", "_private/log_monitor.py", "dashboard/dashboard.py")


class Slot:
    """Lives on a rank's node, as a Ray actor: owns one nursery, and through it one rank at a time."""

    def __init__(self, entry: str, log: str, predecessors: Sequence[int]) -> None:
        self.entry, self.log, self.predecessors = entry, log, predecessors
        self.nursery: asyncio.subprocess.Process | None = None
        self.pid = 0
        self.answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.ending: asyncio.Future[dict[str, Any]] | None = None

    async def prepare(self) -> dict[str, Any]:
        """Where this slot is, once its nursery has imported everything and no process of a predecessor is
        left. The port is one that nobody listened on a moment ago."""
        await _until_gone(self.predecessors)
        if self.nursery is None or self.nursery.returncode is not None:
            await self._start_nursery()
        assert self.nursery is not None
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        return {"address": address, "port": port, "host": socket.gethostname(), "nursery": self.nursery.pid}

    async def start(self, env: dict[str, str], segment: str) -> int:
        """The rank's process id."""
        self.ending = asyncio.get_running_loop().create_future()
        self._ask(start={"env": env, "segment": segment, "log": self.log})
        self.pid = int((await self._answer())["started"])
        return self.pid

    async def ended(self) -> dict[str, Any]:
        """How the rank ended, when it has."""
        assert self.ending is not None
        return await asyncio.shield(self.ending)

    async def kill(self) -> None:
        """Kill the rank, if there is one. A nursery that does not obey is killed too."""
        if self.ending is None or self.ending.done():
            return
        self._ask(kill=True)
        done, _ = await asyncio.wait([self.ending], timeout=GONE_WITHIN / 2)
        if not done:
            assert self.nursery is not None
            self.nursery.kill()

    async def _start_nursery(self) -> None:
        """In a session of its own, without what Ray has put into our environment (its token is no rank's)."""
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONBREAK"))
        }
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(self.log).open("ab") as errors:
            self.nursery = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "parallelism.nursery", "--entry", self.entry),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=own,
                start_new_session=True,
            )
        self.answers = asyncio.Queue()
        self.listening = asyncio.create_task(self._listen(self.nursery))
        await self._answer()

    async def _listen(self, nursery: asyncio.subprocess.Process) -> None:
        assert nursery.stdout is not None
        while line := await nursery.stdout.readline():
            answer = json.loads(line)
            if "ended" in answer:
                self._end(answer["exit_code"], answer["signal"], answer["time"])
            else:
                self.answers.put_nowait(answer)
        await nursery.wait()
        self.answers.put_nowait(None)
        if self.ending is not None and not self.ending.done():
            await _until_gone(_kill_group(self.pid))  # the kernel kills the rank itself, nobody its children
            self._end(None, None, time.time(), note="was lost: its nursery died")

    def _end(self, exit_code: int | None, by: int | None, when: float, note: str = "") -> None:
        assert self.ending is not None
        self.ending.set_result(
            {"pid": self.pid, "exit_code": exit_code, "signal": by, "time": when, "note": note}
        )

    def _ask(self, **request: Any) -> None:
        assert self.nursery is not None
        assert self.nursery.stdin is not None
        self.nursery.stdin.write(json.dumps(request).encode() + b"\n")

    async def _answer(self) -> dict[str, Any]:
        answer = await self.answers.get()
        if answer is None:
            assert self.nursery is not None
            raise RuntimeError(f"its nursery died (exit code {self.nursery.returncode})")
        return answer


class Slots:
    """The island's slots as its supervisor sees them. Ranks are numbered as the slots are."""

    def __init__(self, ranks: int, directory: Path, logs: Path, entry: str) -> None:
        self.group = form(ranks, directory)
        self.logs, self.entry = logs, entry
        self.actors: list[Any] = [None] * ranks
        self.facts: list[dict[str, Any] | None] = [None] * ranks  # what prepare() told; None: not ready
        self.nurseries, self.pids = [0] * ranks, [0] * ranks
        self.preparing: dict[Any, int] = {}
        self.running: dict[Any, int] = {}

    @property
    def ready(self) -> bool:
        return all(self.facts)

    def prepare(self, seconds: float) -> list[End]:
        """Prepare the slots that are not ready, and wait up to so many seconds; those that failed."""
        for rank in range(len(self.actors)):
            if self.facts[rank] is None and rank not in self.preparing.values():
                if self.actors[rank] is None:
                    self.actors[rank] = self._create(rank)
                self.preparing[self.actors[rank].prepare.remote()] = rank
        failed = []
        for ref in _finished(self.preparing, seconds):
            rank = self.preparing.pop(ref)
            found, problem = _result(ref)
            if problem is None:
                self.facts[rank], self.nurseries[rank] = found, found["nursery"]
            else:
                failed.append(self._lose(rank, problem))
        return failed

    def start(self, environments: Sequence[dict[str, str]], segment: Path) -> list[End]:
        """Start all ranks (`pids`); those that failed. Afterwards the slots are to be prepared again."""
        started = [
            actor.start.remote(env, str(segment))
            for actor, env in zip(self.actors, environments, strict=True)
        ]
        self.facts = [None] * len(self.actors)
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
        return sorted((self._end(ref) for ref in _finished(self.running, seconds)), key=lambda end: end.time)

    def kill(self) -> list[End]:
        """Kill all ranks at once, and wait until they are gone; how they ended. Those of a lost slot are
        waited for when it is prepared again. Raises RuntimeError when a process survives."""
        for actor in filter(None, self.actors):
            actor.kill.remote()
        deadline = time.monotonic() + 2 * GONE_WITHIN
        ends = []
        while self.running and time.monotonic() < deadline:
            ends += self.ends(1.0)
        if self.running:
            raise RuntimeError(f"ranks {sorted(self.running.values())} do not end though killed")
        return ends

    def close(self) -> None:
        ray.shutdown()

    def _create(self, rank: int) -> Any:
        place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
        options = {"num_cpus": 0, "resources": {"rank": 1}, "scheduling_strategy": place}
        log = self.logs / f"rank-{rank:04d}.log"
        predecessors = [pid for pid in (self.nurseries[rank], self.pids[rank]) if pid]
        return ray.remote(Slot).options(**options).remote(self.entry, str(log), predecessors)

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


def form(ranks: int, directory: Path) -> PlacementGroup:
    """Start Ray for this allocation alone, with a place for each rank. One node so far: an allocation of
    several starts the others' from here, and waits for them.

    Ranks are a resource of their own rather than CPUs, since they may outnumber the cores.
    """
    ray.init(
        num_cpus=0,
        num_gpus=0,
        resources={"rank": ranks},
        object_store_memory=_OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
        _temp_dir=str(directory / "ray"),
    )
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.endswith(_USELESS) for word in process.cmdline()):
                process.kill()
    group = placement_group([{"rank": 1}] * ranks, strategy="PACK")
    ray.get(group.ready())
    return group


def _finished(refs: Mapping[Any, int], seconds: float) -> list[Any]:
    """Those with a result: as soon as there is one, at the latest after so many seconds."""
    done, _ = ray.wait([*refs], timeout=seconds)
    if done:
        done, _ = ray.wait([*refs], num_returns=len(refs), timeout=0.0)
    return list(done)


def _result(ref: Any) -> tuple[Any, Exception | None]:
    try:
        return ray.get(ref), None
    except ray.exceptions.RayError as problem:
        return None, problem


async def _until_gone(pids: Sequence[int]) -> None:
    """Raises RuntimeError when one of them is still there after GONE_WITHIN seconds."""
    deadline = time.monotonic() + GONE_WITHIN
    while left := [pid for pid in pids if _alive(pid)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} of its predecessor do not end")
        await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill_group(leader: int) -> list[int]:
    """The processes that were in the group."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == leader:
                members.append(pid)
                os.kill(pid, signal.SIGKILL)
    return members
