"""The coordinator, killed wherever it may be: nothing submitted twice, nothing lost, nothing booked twice."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusters.rounds import genesis
from clusters.site import Site
from orchestrator import campaign as campaign_module
from orchestrator import kinds, lease
from orchestrator.campaign import Campaign
from orchestrator.fold import fold
from orchestrator.home import RunFolder
from orchestrator.ledger import Ledger
from orchestrator.plan import make_plan
from orchestrator.spec import parse_run
from orchestrator.state import RunState
from orchestrator.store import Store
from tests.orchestrator.simulated_site import SimulatedSite, site_facts

RUN = "trial-aaaaaa"
SITES = ("east", "west")
RUN_TOML = """
name = "trial"
[model]
preset = "llama-3m"
[data]
prefixes = ["data/x"]
[training]
tokens = "384"
sequence_length = 8
global_batch = 1
micro_batch = 1
learning_rate = 1e-3
[rounds]
inner_steps = 8
deadline = "10min"
[checkpoint]
every_steps = 8
[[islands]]
site = "east"
allocation = "sun"
tp = 2
time_limit = "1h"
[[islands]]
site = "west"
allocation = "moon"
pp = 2
time_limit = "1h"
"""
ROUNDS = 3


class Killed(BaseException):
    """kill -9, as seen from inside: no handler runs but the test's own."""


@dataclass
class Fuse:
    """Counts the controller's steps into the world and cuts it off before or after one of them."""

    left: int | None = None
    after: bool = False
    burnt: int = 0

    def around(self, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            last = self.left == 0
            self.left = None if self.left is None or last else self.left - 1
            if last and not self.after:
                self.burnt += 1
                raise Killed
            result = function(*args, **kwargs)
            if last:
                self.burnt += 1
                raise Killed
            return result

        return called


@dataclass
class World:
    """Sites, database and home directory: what survives a controller."""

    root: Path
    sites: dict[str, SimulatedSite] = field(init=False)

    def __post_init__(self) -> None:
        self.sites = {name: SimulatedSite(self.root / name) for name in SITES}
        for site in self.sites.values():
            site.scratch.mkdir()
        with self.opened() as (store, ledger):
            for allocation in ("sun", "moon"):
                ledger.grant(allocation, 10_000_000, "core-hour", "g")
            plan = make_plan(parse_run(RUN_TOML, "run.toml"), self.facts(), ledger)
            store.record(RUN, kinds.RUN_CREATED, plan=plan.to_json())

    def facts(self) -> dict[str, Site]:
        return {name: site_facts(name, self.root / name) for name in SITES}

    def opened(self) -> Any:
        @contextlib.contextmanager
        def opening() -> Iterator[tuple[Store, Ledger]]:
            store = Store(f"sqlite:///{self.root}/log.db")
            try:
                yield store, Ledger(store)
            finally:
                store.close()

        return opening()

    def control(self, fuse: Fuse) -> RunState | None:
        """One controller's life; None when the fuse killed it."""
        with self.opened() as (store, ledger):
            facts = {name: SiteWith(site, Cut(self.sites[name], fuse)) for name, site in self.facts().items()}
            for owner, names in (
                (store, ("record", "ingest_site")),
                (ledger, ("reserve", "settle", "release")),
            ):
                for name in names:
                    setattr(owner, name, fuse.around(getattr(owner, name)))
            campaign = Campaign(RUN, store, ledger, RunFolder(self.root / "run"), facts)  # type: ignore[arg-type]
            try:
                return campaign.until_the_end(lease.acquire(store, RUN, lambda _: None))
            except Killed:
                return None

    def state(self) -> RunState:
        with self.opened() as (store, _):
            return fold(RUN, store.events(RUN))


@dataclass(frozen=True)
class SiteWith:
    """A site's facts with a connection of the test's, which answers at once."""

    site: Site
    connection: Any
    watch_seconds: float = 0.0
    lag_seconds: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.site, name)

    def connect(self, _home: Path) -> Any:
        return self.connection


@dataclass
class Cut:
    """A connection that the fuse can cut."""

    site: SimulatedSite
    fuse: Fuse

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        if any(o["op"] in ("submit", "stop") for o in operations):
            return list(self.fuse.around(self.site.exchange)(operations, timeout))
        return self.site.exchange(operations, timeout)

    def fetch(self, source: str, target: Path) -> int:
        return int(self.fuse.around(self.site.fetch)(source, target))

    def push(self, source: Path, target: str) -> int:
        return int(self.fuse.around(self.site.push)(source, target))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, no curves: neither is what these tests are about."""

    class NoCurves:
        def __init__(self, _folder: Path) -> None: ...
        def add(self, _event: object) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(campaign_module, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(campaign_module, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(campaign_module, "Curves", NoCurves)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def check_the_books(world: World, state: RunState) -> None:
    """What must hold at the end of every run, however it went."""
    submitted = [key for site in world.sites.values() for key in site.submissions]
    assert len(submitted) == len(set(submitted)), "a key was submitted twice"
    with world.opened() as (store, ledger):
        for allocation in ledger.allocations():
            balance = ledger.balance(allocation)
            assert balance.committed == 0, f"{allocation} still holds units for a run that is over"
            assert balance.granted == balance.available + balance.settled
        kinds_logged = [e.kind for e in store.events(RUN)]
    segments = [s for i in state.islands.values() for s in i.segments]
    assert all(s.over for s in segments)
    assert sorted(s.key for s in segments if s.settled is not None) == sorted(submitted)
    assert kinds_logged.count(kinds.ROUND_CLOSED) == len(state.closed)
    chain = genesis(RUN)
    for closed in state.closed:
        assert closed.base == chain
        chain = closed.identity


def test_an_undisturbed_run(world: World) -> None:
    state = world.control(Fuse())
    assert state is not None
    assert state.outcome == "completed"
    assert [c.number for c in state.closed] == list(range(1, ROUNDS + 1))
    assert all(len(c.contributions) == 2 for c in state.closed)
    assert {s: len(i.segments) for s, i in state.islands.items()} == {"east": 1, "west": 1}
    check_the_books(world, state)


def test_bases_that_drift_apart_are_reset(world: World) -> None:
    """Seen with the first updates; the round after the next one has everyone on one island's base."""
    world.sites["west"].drifts = True
    state = world.control(Fuse())
    assert state is not None
    assert state.outcome == "completed"
    assert [closed.reset_from for closed in state.closed] == ["east", "", ""]
    apart = "the bases of east and west are 2.5e-01 apart in w"
    assert state.alerts == [f"round 1: {apart}; all take that of east next"]
    assert state.drift == {"value": 0.0, "tensor": "w", "sites": ["east", "west"]}
    check_the_books(world, state)


@pytest.mark.parametrize(("value", "why"), [(1000.0, "its norm is 1000, "), (math.nan, "it is not finite")])
def test_an_update_that_is_of_no_use_stops_nobody(world: World, value: float, why: str) -> None:
    world.sites["west"].values[3] = value
    state = world.control(Fuse())
    assert state is not None
    assert state.outcome == "completed"
    assert state.closed_without == {1: [], 2: [], 3: ["west"]}
    assert [closed.discarded for closed in state.closed] == [(), (), ("west",)]
    (alert,) = state.alerts
    assert alert.startswith(f"update of round 3 refused: west: {why}")
    check_the_books(world, state)


def test_killed_at_every_step_and_on_both_sides_of_it(tmp_path: Path) -> None:
    """Each call that changes the world is cut before and after its effect, and so is the next controller.

    How many steps a run takes varies with the order of the polls, so a step counts as the last when the run
    ended by itself before it, thrice in a row.
    """
    kills = unreached = step = 0
    while unreached < 3:
        burnt = 0
        for after in (False, True):
            folder = tmp_path / f"{step}-{after}"
            folder.mkdir()
            world = World(folder)
            for fuse in (Fuse(step, after), Fuse(7 * step % 20, not after), Fuse()):
                state = world.control(fuse)
                burnt += fuse.burnt
                if state is not None:
                    break
            assert state is not None
            assert state.outcome == "completed", state.reason
            assert len(state.closed) == ROUNDS
            check_the_books(world, state)
        kills, step, unreached = kills + burnt, step + 1, 0 if burnt else unreached + 1
    print(f"{kills} controllers killed in {2 * step} runs")
    assert kills >= 200, f"only {kills} controllers were killed"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=6), lost=st.booleans())
def test_killed_again_and_again(cuts: list[tuple[int, bool]], lost: bool) -> None:
    """Several controllers in a row die anywhere; with `lost`, an island's job vanishes as well."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        if lost:
            world.sites["west"].dies_at[f"{RUN}.west.0000"] = 8
        for left, after in cuts:
            if world.control(Fuse(left, after)) is not None:
                break
        state = world.control(Fuse())
        assert state is not None
        assert state.outcome == "completed", state.reason
        assert len(state.islands["west"].segments) == (2 if lost else 1)
        check_the_books(world, state)


def test_stop_drains_and_resume_goes_on(world: World) -> None:
    with world.opened() as (store, ledger):
        facts = {n: SiteWith(s, Cut(world.sites[n], Fuse())) for n, s in world.facts().items()}
        folder = RunFolder(world.root / "run")

        def listener(event: Any, state: RunState) -> None:
            if len(state.closed) == 1:
                campaign.request_stop()

        campaign = Campaign(RUN, store, ledger, folder, facts, listener)  # type: ignore[arg-type]
        held = lease.acquire(store, RUN, lambda _: None)
        stopped = campaign.until_the_end(held)
        assert stopped.outcome == "stopped"
        assert 1 <= len(stopped.closed) < ROUNDS
        store.record(RUN, kinds.RUN_RESUMED, holder="x")
    state = world.control(Fuse())
    assert state is not None
    assert state.outcome == "completed"
    assert all(len(i.segments) == 2 for i in state.islands.values())
    check_the_books(world, state)


def test_an_allocation_that_runs_dry_stops_its_island_with_the_figures(world: World) -> None:
    with world.opened() as (_, ledger):
        ledger.reserve("moon", "somebody-else", 9_500_000)
    state = world.control(Fuse())
    assert state is not None
    assert state.outcome == "failed"
    assert "2 core-hours asked, 0.5 core-hours available" in state.reason
    assert not world.sites["west"].submissions
    assert state.islands["east"].completed
