"""`eurotrain bench watch`: what it costs a controller to watch many sites with many jobs each.

The sites are simulated: their squeue and sacct print files, and their jobs are directories that nobody works
in. All else is the product's own: each site's agent is a process that answers over the real protocol, and
the coordinator of one run with an island at every site asks, logs, folds and decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import insert

from clusters import events as site_kinds
from clusters.connection import LocalConnection
from clusters.events import EventWriter
from clusters.paths import SitePaths
from clusters.site import Site, load_sites
from clusters.slurm_records import SACCT_FIELDS, SEPARATOR, SQUEUE_FIELDS
from orchestrator import kinds
from orchestrator.campaign import Campaign
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from orchestrator.plan import make_plan
from orchestrator.spec import parse_run
from orchestrator.spread import spread
from orchestrator.store import CONTROLLER, Store
from orchestrator.tables import events
from orchestrator.units import micro_units

_RUN = "watched-aaaaaa"
_SITE = """\
[{name}]
catalogue = "leonardo"
scratch = {scratch}
account = "acc"
partition = "boost_usr_prod"
qos = "normal"
rank_tflops = 1
efficiency = 0.5
poll = "{poll}"
"""
_RUN_TOML = """\
name = "watched"
[model]
preset = "llama-3m"
[data]
prefixes = ["data/x"]
[training]
tokens = {tokens}
sequence_length = 128
global_batch = 16
micro_batch = 8
learning_rate = 4e-3
[rounds]
inner_steps = 100
[checkpoint]
every_steps = 100
"""
_ISLAND = '[[islands]]\nsite = "{name}"\nallocation = "acc"\ntp = 2\ntime_limit = "24h"\n'
_STEPS = 1_000_000  # of each island: nothing ends while it is watched
_PROGRAMS = {
    **{name: f"#!/bin/sh\nexec cat {name}.says\n" for name in ("squeue", "sacct")},
    **dict.fromkeys(("scontrol", "sacctmgr"), "#!/bin/sh\n"),
}


@dataclass(frozen=True)
class Counted(LocalConnection):
    """A connection that keeps the last answer of its site, and counts them."""

    heard: list[list[dict[str, Any]]] = field(default_factory=lambda: [[]])
    answers: list[int] = field(default_factory=lambda: [0])

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        self.heard[0] = super().exchange(operations, timeout)
        self.answers[0] += 1
        return self.heard[0]


@dataclass(frozen=True)
class WatchedSite(Site):
    """A simulated site; its connection is made once, so that its answers can be counted."""

    counted: Counted = field(kw_only=True)

    def connect(self, home: Path) -> Counted:  # noqa: ARG002
        return self.counted


def watch(sites: int, jobs: int, cycles: int, interval: float, talking: int) -> dict[str, Any]:
    """CPU seconds and memory of the controller, for each interval in which every site is polled once.

    `talking`: jobs of each site that tell one more step in every interval.
    """
    with tempfile.TemporaryDirectory(prefix="eurotrain-watch-") as folder, _programs(Path(folder) / "bin"):
        world = _World(Path(folder), sites, jobs, interval)
        try:
            return world.measure(cycles, talking)
        finally:
            world.close()


@contextlib.contextmanager
def _programs(folder: Path) -> Iterator[None]:
    """Slurm's programs, first on the agents' PATH: each prints what lies in its site's scratch."""
    folder.mkdir()
    for name, text in _PROGRAMS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}:{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


class _World:
    """Sites, log and coordinator."""

    def __init__(self, root: Path, sites: int, jobs: int, interval: float) -> None:
        self.memory_before = psutil.Process().memory_info().rss
        home = Home(root / "home")
        home.root.mkdir()
        names = [f"site-{number:02d}" for number in range(1, sites + 1)]
        self.sites = _sites(home, root, names, interval)
        self.store = Store(f"sqlite:///{home.root}/eurotrain.db")
        ledger = Ledger(self.store)
        ledger.grant("acc", micro_units("1000000"), next(iter(self.sites.values())).unit, "bench")
        tokens = _STEPS * 16 * 128 * sites
        spec = _RUN_TOML.format(tokens=tokens) + "".join(_ISLAND.format(name=name) for name in names)
        plan = make_plan(parse_run(spec, "run.toml"), self.sites, ledger).to_json()
        self.keys = {name: [f"{_RUN}.{name}.{n:04d}" for n in range(jobs)] for name in names}
        for name, site in self.sites.items():
            _fill(site.scratch, self.keys[name])
        _log(self.store, plan, self.keys)
        folder = home.run(_RUN)
        folder.root.mkdir(parents=True)
        self.campaign = Campaign(_RUN, self.store, ledger, folder, self.sites)
        self.told = 0

    def close(self) -> None:
        self.campaign.close()
        self.store.close()

    def measure(self, cycles: int, talking: int) -> dict[str, Any]:
        """The first interval is not counted: it takes in the whole log, and asks for each site's limits."""
        self._interval(talking)
        costs = [self._interval(talking) for _ in range(cycles)]
        return {
            "sites": len(self.sites),
            "jobs_per_site": len(next(iter(self.keys.values()))),
            "talking_per_site": talking,
            "interval_seconds": next(iter(self.sites.values())).poll_seconds,
            "cycles": cycles,
            "controller_cpu_seconds": _spread([own for own, _ in costs]),
            "agents_cpu_seconds": _spread([agents for _, agents in costs]),  # it would be spent at the sites
            "bare_parse_cpu_seconds": _spread([self._parse() for _ in range(cycles)]),
            "answer_bytes": sum(len(text) for text in self._answers()),
            "memory_mib": round(psutil.Process().memory_info().rss / 2**20, 1),
            "memory_before_mib": round(self.memory_before / 2**20, 1),
            "simulated": True,
        }

    def _interval(self, talking: int) -> tuple[float, float]:
        """CPU seconds of this process and of its agents, from one poll of every site to the next."""
        self._talk(talking)
        answered = {name: site.counted.answers[0] for name, site in self.sites.items()}
        own, agents = _cpu(resource.RUSAGE_SELF), _cpu(resource.RUSAGE_CHILDREN)
        while any(not self._heard(name, answered[name], talking) for name in self.sites):
            self.campaign.turn()
        return _cpu(resource.RUSAGE_SELF) - own, _cpu(resource.RUSAGE_CHILDREN) - agents

    def _heard(self, site: str, answered: int, talking: int) -> bool:
        """Whether the site has answered again, and what it told has been taken in as well."""
        if self.sites[site].counted.answers[0] == answered:
            return False
        return not talking or self.campaign.state.islands[site].step == self.told

    def _talk(self, talking: int) -> None:
        """What ranks write; not counted."""
        self.told += 1
        step = {"step": self.told, "loss": 5.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 2048}
        for name, site in self.sites.items():
            for key in self.keys[name][:talking]:
                stream = SitePaths(site.scratch).segment(key).events / "ranks.jsonl"
                EventWriter(stream).emit(site_kinds.STEP, **step, seconds=1.0)

    def _answers(self) -> list[str]:
        return [json.dumps(site.counted.heard[0]) for site in self.sites.values()]

    def _parse(self) -> float:
        """CPU seconds of nothing but reading all sites' answers."""
        answers = self._answers()
        began = time.process_time()
        for text in answers:
            json.loads(text)
        return time.process_time() - began


def _sites(home: Home, root: Path, names: list[str], interval: float) -> dict[str, WatchedSite]:
    poll = time.strftime("%H:%M:%S", time.gmtime(max(1.0, interval)))
    tables = [_SITE.format(name=n, scratch=json.dumps(str(root / n)), poll=poll) for n in names]
    home.sites.write_text("\n".join(tables))
    return {
        name: WatchedSite(name, site.machine, site.own, counted=Counted(site.scratch))
        for name, site in load_sites(home.sites).items()
    }


def _fill(scratch: Path, keys: list[str]) -> None:
    """Jobs that run, for Slurm and in their directories."""
    now = int(time.time())
    queue, books = [], []
    for number, key in enumerate(keys, 1):
        paths = SitePaths(scratch).segment(key)
        EventWriter(paths.events / "ranks.jsonl")
        (paths.events / "ranks.jsonl").touch()
        paths.heartbeat.touch()
        paths.segment.touch()
        common = [str(number), key, "RUNNING", str(now - 60), str(now - 50)]
        tres = "cpu=32,mem=494000M,node=1,billing=32,gres/gpu=4"
        queue.append([*common, str(now + 86400), "0", f"lrdn{number:04d}", tres, "0:50", "None"])
        books.append([*common, "Unknown", "0:0", f"lrdn{number:04d}", tres, "50", ""])
    for name, rows, fields in (("squeue", queue, SQUEUE_FIELDS), ("sacct", books, SACCT_FIELDS)):
        assert all(len(row) == len(fields) for row in rows)
        (scratch / f"{name}.says").write_text("".join(SEPARATOR.join(row) + "\n" for row in rows))


def _log(store: Store, plan: dict[str, Any], keys: dict[str, list[str]]) -> None:
    """A run whose segments all run, in one transaction: 24,000 would take longer than what is measured."""
    now = time.time()
    told: list[tuple[str, dict[str, Any]]] = [(kinds.RUN_CREATED, {"plan": plan})]
    for site, of_site in keys.items():
        for number, key in enumerate(of_site):
            segment = {"site": site, "key": key}
            told.append((kinds.SEGMENT_INTENDED, {**segment, "sequence": number, "reserved": 0}))
            job = {"state": "running", "job_id": str(number + 1), "submitted": now - 60, "started": now - 50}
            told.append((kinds.JOB_OBSERVED, {**segment, **job}))
    common = {"run": _RUN, "site": "", "segment": "", "stream": CONTROLLER, "time": now, "received": now}
    rows = [{**common, "offset": n, "kind": kind, "facts": facts} for n, (kind, facts) in enumerate(told)]
    with store.database.writing() as connection:
        connection.execute(insert(events), rows)


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def _spread(values: list[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in spread(values).items()}
