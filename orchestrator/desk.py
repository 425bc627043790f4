"""The operator's desk: home directory, event log, ledger and sites, opened together."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clusters.paths import write_atomically
from clusters.site import Site, load_sites
from clusters.submission import submission
from orchestrator import bundle, kinds, readiness
from orchestrator.admission import place_of, plan_reasons
from orchestrator.campaign import Campaign
from orchestrator.campaign import Listener as Hears
from orchestrator.fold import fold
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from orchestrator.plan import IslandPlan, Plan, make_plan
from orchestrator.spec import load_run, new_run_id
from orchestrator.stage import Listener, Options, Stager
from orchestrator.state import RunState
from orchestrator.stock import Stock
from orchestrator.store import Store
from orchestrator.suggest import unknown


@dataclass(frozen=True)
class Desk:
    """What a command works with."""

    home: Home
    store: Store
    ledger: Ledger

    @classmethod
    def open(cls) -> Desk:
        """Raises ValueError when the database cannot be used."""
        home = Home.from_environment()
        home.root.mkdir(parents=True, exist_ok=True)
        store = Store(home.database)
        return cls(home, store, Ledger(store))

    def sites(self) -> dict[str, Site]:
        """Raises ValueError, naming what is wrong in sites.toml."""
        return load_sites(self.home.sites)

    def plan(self, run_toml: Path) -> Plan:
        """Raises ValueError with one line for each thing that is wrong."""
        sites = self.sites()
        plan = make_plan(load_run(run_toml), sites, self.ledger)
        for island in plan.islands:
            # what cannot be submitted is not launched
            submission(sites[island.site], island.ranks, island.nodes, "")
        return replace(plan, islands=tuple(_explained(island, sites[island.site]) for island in plan.islands))

    def stager(self, site: str, options: Options, listener: Listener | None = None) -> Stager:
        """What brings things to a site. Raises ValueError naming the nearest when it is unknown."""
        known = self.sites()
        if site not in known:
            raise ValueError(f"{self.home.sites}: {unknown('site', site, known)}")
        connection, old = known[site].connect(self.home.root), readiness.old_age(known[site])
        return Stager(site, connection, Stock(self.home.staged), options, listener or Listener(), old)

    def stage_bundle(self, site: str, stager: Stager) -> dict[str, Any]:
        """See orchestrator.bundle.stage; nothing for a site on this machine."""
        facts = self.sites()[site]
        return bundle.stage(facts, stager, self.home.wheelhouse) if facts.own.host else {}

    def unstaged(self, run_toml: Path, plan: Plan) -> list[str]:
        """What `ready` would miss at sites elsewhere, by what was staged from here: no site is asked."""
        sites = {name: pair for name, pair in self._reached(plan).items() if pair[0].own.host}
        tokenizer = load_run(run_toml).data.tokenizer
        return readiness.unstaged(plan, tokenizer, sites, Stock(self.home.staged), run_toml)

    def ready(self, run_toml: Path, plan: Plan) -> tuple[Plan, list[str]]:
        """The plan with what its segments need at their sites, where each site has confirmed it (law 5).

        With warnings of what may not be there for long. Raises ValueError, a line for each site that lacks
        something; OSError for one that does not answer.
        """
        tokenizer, stock = load_run(run_toml).data.tokenizer, Stock(self.home.staged)
        return readiness.ready(plan, tokenizer, self._reached(plan), stock, run_toml)

    def _reached(self, plan: Plan) -> readiness.Sites:
        known = self.sites()
        return {i.site: (known[i.site], known[i.site].connect(self.home.root)) for i in plan.islands}

    def create(self, run_toml: Path, plan: Plan) -> str:
        """Log a new run and lay out its folder; its name. Nothing is submitted yet."""
        name = new_run_id(plan.name)
        folder = self.home.run(name)
        folder.root.mkdir(parents=True)
        shutil.copyfile(run_toml, folder.spec)
        write_atomically(folder.plan, json.dumps(plan.to_json(), indent=1))
        self.store.record(name, kinds.RUN_CREATED, plan=plan.to_json())
        return name

    def run(self, name: str | None) -> str:
        """A run by name, or the newest. Raises ValueError naming the nearest."""
        runs = self.store.runs()
        if not runs:
            raise ValueError("there is no run yet: start one with eurotrain launch run.toml")
        if name is None:
            return runs[-1]
        if name not in runs:
            raise ValueError(unknown("run", name, runs))
        return name

    def islands(self, place: str, site: str | None) -> tuple[str, list[str]]:
        """The run that a PLACE names which is no directory, and the sites of its islands. Raises ValueError,
        also where it has none at `site`."""
        if place not in self.store.runs() and ("/" in place or not self.store.runs()):
            raise ValueError(f"{place}: neither a directory nor a run")
        run = self.run(place)
        islands = list(self.state(run).islands)
        if site is not None and site not in islands:
            raise ValueError(f"run {run} has no island at {site} (its sites: {', '.join(islands)})")
        return run, islands

    def state(self, run: str) -> RunState:
        return fold(run, self.store.events(run))

    def campaign(self, run: str, listener: Hears) -> Campaign:
        """The coordinator of a run, not yet at work. Raises ValueError when a site of it is unknown."""
        known = self.sites()
        wanted = [island["site"] for island in self.state(run).plan["islands"]]
        missing = [site for site in wanted if site not in known]
        if missing:
            raise ValueError(f"{self.home.sites}: {unknown('site', missing[0], known)}, which {run} uses")
        folder = self.home.run(run)
        sites = {site: known[site] for site in wanted}
        return Campaign(run, self.store, self.ledger, folder, sites, listener)


def _explained(island: IslandPlan, site: Site) -> IslandPlan:
    return replace(island, reasons=(*island.reasons, *plan_reasons(place_of(site), site.ahead, time.time())))
