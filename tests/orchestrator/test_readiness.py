"""Law 5: nothing is launched or submitted where something is missing, and the line says what to type."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from clusters.connection import Connection, LocalConnection, Unreachable
from clusters.machine import Catalogue
from clusters.site import Site
from orchestrator import bundle, kinds, readiness
from orchestrator.actions import Actor
from orchestrator.decide import Intend
from orchestrator.fold import fold
from orchestrator.home import RunFolder
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, make_plan
from orchestrator.spec import parse_run
from orchestrator.stage import Options, Stager, run_files
from orchestrator.stock import Stock
from orchestrator.store import Store
from tests.orchestrator.simulated_site import SimulatedSite, site_facts
from tests.orchestrator.test_campaign import RUN_TOML

SITES = ("east", "west")


@dataclasses.dataclass
class Desk:
    """Two sites, a run, and what is staged for it."""

    root: Path
    far: bool = True  # sites that are reached by ssh, as far as the operator's part of them tells

    def __post_init__(self) -> None:
        (self.root / "data").mkdir()
        for suffix in ("bin", "idx"):
            (self.root / f"data/x.{suffix}").write_text(suffix)
        self.run_toml.write_text(RUN_TOML)
        for site in SITES:
            (self.root / site).mkdir()

    @property
    def run_toml(self) -> Path:
        return self.root / "run.toml"

    @property
    def stock(self) -> Stock:
        return Stock(self.root / "staged")

    def sites(self) -> dict[str, tuple[Site, Connection]]:
        found: dict[str, tuple[Site, Connection]] = {}
        for name in SITES:
            site = site_facts(name, self.root / name)
            own = dataclasses.replace(site.own, host=name if self.far else "")
            found[name] = (dataclasses.replace(site, own=own), LocalConnection(self.root / name))
        return found

    def plan(self) -> Plan:
        store = Store(f"sqlite:///{self.root}/log.db")
        ledger = Ledger(store)
        for allocation in ("sun", "moon"):
            ledger.grant(allocation, 10_000_000, "core-hour", "g")
        sites = {name: site for name, (site, _) in self.sites().items()}
        plan = make_plan(parse_run(RUN_TOML, "run.toml"), sites, ledger)
        store.close()
        return plan

    def stage(self, *sites: str) -> None:
        for site in sites:
            stager = Stager(site, LocalConnection(self.root / site), self.stock, Options(replace=True))
            if self.far:
                own = dataclasses.replace(self.sites()[site][0].own, python=sys.executable)
                facts = dataclasses.replace(self.sites()[site][0], own=own)
                bundle.stage(facts, stager, self.root / "wheels")
            run_files(stager, self.run_toml)

    def ready(self) -> tuple[Plan, list[str]]:
        return readiness.ready(self.plan(), None, self.sites(), self.stock, self.run_toml)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_what_is_not_staged_is_told_for_every_site_with_what_to_type(desk: Desk) -> None:
    with pytest.raises(ValueError, match="east") as caught:
        desk.ready()
    assert str(caught.value).splitlines() == [
        f"{site}: data/x.bin has not been staged: type `eurotrain stage {site} --run {desk.run_toml}`"
        for site in SITES
    ]


def test_a_plan_tells_what_is_to_be_staged_and_asks_nobody(desk: Desk) -> None:
    nobody = {name: (site, None) for name, (site, _) in desk.sites().items()}

    def lines() -> list[str]:
        return readiness.unstaged(desk.plan(), None, nobody, desk.stock, desk.run_toml)  # type: ignore[arg-type]

    assert [line.partition(":")[0] for line in lines()] == list(SITES)
    desk.stage("east")
    assert lines() == [
        f"west: data/x.bin has not been staged: type `eurotrain stage west --run {desk.run_toml}`"
    ]
    desk.stage("west")
    assert lines() == []
    assert readiness.unstaged(desk.plan(), None, {}, desk.stock, desk.run_toml) == []


def test_what_is_staged_becomes_part_of_the_plan(desk: Desk) -> None:
    desk.stage(*SITES)
    plan, warnings = desk.ready()
    assert [path for path, _, _ in plan.files] == ["data/x.bin", "data/x.idx"]
    assert warnings == []
    assert Plan.from_json(plan.to_json()) == plan
    told = readiness.needs(plan.to_json(), "east", desk.run_toml)["needs"]
    assert told["files"] == [list(content) for content in plan.files]
    bundles = [desk.stock.load(site).bundle["id"] for site in SITES]
    assert [island.bundle for island in plan.islands] == bundles
    assert told["bundle"] == bundles[0]


def test_a_site_that_has_its_text_but_no_bundle(desk: Desk) -> None:
    desk.stage(*SITES)
    record = desk.stock.load("west")
    record.bundle = {}
    desk.stock.save("west", record)
    with pytest.raises(
        ValueError, match=r"^west: a bundle has not been staged: type `eurotrain stage west --run"
    ):
        desk.ready()


def test_a_bundle_of_other_code_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.stage(*SITES)
    monkeypatch.setattr(readiness.probe, "code_digest", lambda: "other")
    _, warnings = desk.ready()
    assert [line.partition(":")[0] for line in warnings] == list(SITES)
    assert "its bundle has other code of eurotrain than this one: type `eurotrain stage" in warnings[0]


def test_a_run_from_before_staging_needs_nothing(desk: Desk) -> None:
    assert readiness.needs(desk.plan().to_json(), "east", desk.run_toml) == {}


def test_what_is_no_longer_there_is_told(desk: Desk) -> None:
    desk.stage(*SITES)
    (desk.root / "west/data/x.idx").unlink()
    with pytest.raises(
        ValueError, match=r"^west: data/x\.idx is not there: type `eurotrain stage west --run"
    ):
        desk.ready()
    desk.stage("west")
    desk.ready()


def test_all_islands_read_the_same_text(desk: Desk) -> None:
    desk.stage("east")
    (desk.root / "data/x.bin").write_text("BIN")
    desk.stage("west")
    with pytest.raises(ValueError, match=r"^data/x\.bin at west is another than at east: islands of one run"):
        desk.ready()


def test_a_site_on_this_machine_needs_no_staging_where_the_text_is(desk: Desk) -> None:
    desk.far = False
    for site in SITES:
        shutil.copytree(desk.root / "data", desk.root / site / "data")
    plan, _ = desk.ready()
    assert len(plan.files) == 2
    (desk.root / "east/data/x.bin").unlink()
    with pytest.raises(ValueError, match=r"^east: data/x\.bin is not there: type"):
        desk.ready()


def test_a_site_that_is_silent(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.stage(*SITES)

    def silent(*_: object) -> None:
        raise Unreachable("west: no answer within 60 s")

    monkeypatch.setattr(LocalConnection, "exchange", silent)
    with pytest.raises(OSError, match=r"^west: no answer within 60 s$"):
        desk.ready()


@pytest.mark.parametrize(("days", "warned"), [(29, False), (31, True)])
def test_what_will_be_purged_soon_is_told(days: int, warned: bool) -> None:
    own = dataclasses.replace(site_facts("x", Path("/leonardo_scratch/large/userexternal/me")).own)
    site = Site("leonardo", Catalogue().load("leonardo"), own)
    told = readiness.purge_warning(site, days * 86400.0, "eurotrain stage leonardo")
    expected = f"leonardo: what was staged is {days} days old, and scratch deletes after 40: type `eurotrain"
    assert [text.startswith(expected) for text in told] == [True] * warned


def test_a_purge_that_nobody_knows_of_warns_of_nothing(desk: Desk) -> None:
    site, _ = desk.sites()["east"]
    assert readiness.purge_warning(site, 1e9, "") == []


def test_age_is_the_oldest_file_s(desk: Desk) -> None:
    desk.stage(*SITES)
    old = time.time() - 50 * 86400
    os.utime(desk.root / "east/data/x.idx", (old, old))
    desk.stage("east")
    plan, _ = desk.ready()
    operation = {"op": "staged", **readiness.needs(plan.to_json(), "east", desk.run_toml)}
    (told,) = LocalConnection(desk.root / "east").exchange([operation])
    assert told["oldest"] > 49 * 86400


# ---- while a run is under way


def test_a_segment_without_its_text_waits_and_the_operator_is_told_once(desk: Desk) -> None:
    desk.stage(*SITES)
    plan, _ = desk.ready()
    run, site = "trial-aaaaaa", SimulatedSite(desk.root / "east")
    store = Store(f"sqlite:///{desk.root}/log.db")
    sites = {name: facts for name, (facts, _) in desk.sites().items()}
    actor = Actor(run, store, Ledger(store), RunFolder(desk.root / "run"), sites, {"east": Checked(site)})
    store.record(run, kinds.RUN_CREATED, plan=plan.to_json())
    (desk.root / "east/data/x.bin").unlink()
    for _ in range(5):
        again = actor.take(Intend("east", 0), fold(run, store.events(run)))
        assert 0 < again < 1e6, "it is tried again, and the island is not given up"
    state = fold(run, store.events(run))
    remedy = f"eurotrain stage east --run {desk.root}/run/run.toml"
    assert state.alerts == [f"east: data/x.bin is not there: type `{remedy}`"]
    assert state.islands["east"].given_up is None
    assert site.submissions == []
    desk.stage("east")
    actor.take(Intend("east", 0), state)
    assert site.submissions == [f"{run}.east.0000"]
    store.close()


@dataclasses.dataclass
class Checked:
    """The real agent's check, then a simulated submission."""

    site: SimulatedSite

    def exchange(self, operations: list[dict[str, object]], timeout: float = 60.0) -> list[dict[str, object]]:
        del timeout
        (operation,) = operations
        (told,) = LocalConnection(self.site.scratch).exchange([{"op": "staged", "needs": operation["needs"]}])
        return self.site.exchange([operation]) if told["ok"] else [told]
