"""What the coordinator asks of a Slurm site and logs: as its answers come, not as one would wish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clusters import events as site_kinds
from clusters.site import Site, load_sites
from orchestrator import kinds
from orchestrator.actions import Actor
from orchestrator.campaign import Campaign
from orchestrator.choices import Exclude, Intend, Learn, Submit
from orchestrator.fold import fold
from orchestrator.home import RunFolder
from orchestrator.ledger import Ledger
from orchestrator.state import RunState
from orchestrator.store import Store
from tests.orchestrator.story import RUN, A, Story, key, tell

SITES = f"""
[{A}]
catalogue = "leonardo"
host = "{A}"
scratch = "/s"
account = "acc"
partition = "boost_usr_prod"
exclude = ["own1"]
"""
PENDING = {
    "ok": True,
    "state": "pending",
    "job_id": "7",
    "submitted": 1.0,
    "started": 0.0,
    "evidence": "sbatch",
}


@dataclass
class Scripted:
    """A site's agent as the controller sees it: what was asked, and the next answers."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def exchange(self, operations: list[dict[str, Any]], timeout: float = 60.0) -> list[dict[str, Any]]:
        del timeout
        self.asked += operations
        return [self.answers.pop(0) for _ in operations]


@dataclass
class Stage:
    """An actor, its site and its log."""

    store: Store
    ledger: Ledger
    site: Scripted
    actor: Actor
    story: Story

    @property
    def state(self) -> RunState:
        tell(self.store, self.story)
        self.story.events.clear()
        return fold(RUN, self.store.events(RUN))

    def take(self, action: Any, *answers: dict[str, Any]) -> float:
        self.site.answers = list(answers)
        return self.actor.take(action, self.state)

    def logged(self, kind: str) -> list[dict[str, Any]]:
        return [dict(e.facts) for e in self.store.events(RUN) if e.kind == kind]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    (tmp_path / "sites.toml").write_text(SITES)
    sites: dict[str, Site] = load_sites(tmp_path / "sites.toml")
    store = Store(tmp_path / "log.db")
    ledger = Ledger(store)
    ledger.grant("demo-a", 100_000_000, "core-hour", "g")
    site = Scripted()
    actor = Actor(RUN, store, ledger, RunFolder(tmp_path / "run"), sites, {A: site})  # type: ignore[dict-item]
    yield Stage(store, ledger, site, actor, Story(rounds=None))
    store.close()


def test_a_shorter_segment_reserves_less_and_begins_when_it_is_told(stage: Stage) -> None:
    stage.take(Intend(A, 0, "", 900.0, 9e9, "ends before m"), PENDING)
    (intended,) = stage.logged(kinds.SEGMENT_INTENDED)
    assert (intended["time_limit_seconds"], intended["begin"], intended["reason"]) == (
        900.0,
        9e9,
        "ends before m",
    )
    planned = stage.state.plan_of(A)["reserved"]
    assert intended["reserved"] == stage.ledger.balance("demo-a").committed == planned // 2
    (asked,) = stage.site.asked
    assert asked["request"]["begin"] == 9e9
    assert '"time_limit_seconds": 900.0' in asked["segment"]


def test_what_is_submitted_again_is_the_same_segment(stage: Stage) -> None:
    """Law 1: a key has one meaning for ever, whatever the limits are by now."""
    stage.take(Intend(A, 0, "", 900.0, 9e9), {"ok": True, "state": "unknown", "evidence": "lost"})
    stage.take(Submit(A, key(A)), PENDING)
    first, second = stage.site.asked
    assert first["segment"] == second["segment"]
    assert first["request"]["begin"] == second["request"]["begin"]


def test_a_submission_keeps_away_from_bad_nodes(stage: Stage) -> None:
    stage.story.intend(A).job(A, "running", nodes="n[1-2]")
    stage.story.add(site_kinds.NODE_LOST, at=A, host="n2", reason="gone")
    stage.take(Intend(A, 1), PENDING)
    assert stage.site.asked[0]["request"]["exclude"] == ["n2", "own1"]


def test_a_full_queue_is_waited_for_and_not_a_failure(stage: Stage) -> None:
    full = {
        "ok": True,
        "state": "absent",
        "held": "Slurm takes no more jobs now: QOSMaxSubmitJobPerUserLimit",
    }
    stage.take(Intend(A, 0), full)
    for _ in range(5):
        assert stage.take(Submit(A, key(A)), full) > 60
    assert stage.logged(kinds.JOB_OBSERVED) == stage.logged(kinds.ISLAND_GIVEN_UP) == []
    assert stage.state.islands[A].activity.startswith("waiting: Slurm takes no more jobs now")
    stage.take(Submit(A, key(A)), PENDING)
    assert stage.state.islands[A].held == ""


def test_a_refusal_is_still_one(stage: Stage) -> None:
    refused = {"ok": False, "error": "submit: Invalid account"}
    stage.take(Intend(A, 0), refused)
    for _ in range(2):
        stage.take(Submit(A, key(A)), refused)
    (given_up,) = stage.logged(kinds.ISLAND_GIVEN_UP)
    assert given_up["reason"].endswith("3 times: submit: Invalid account")


def test_what_a_site_allows_is_logged_when_it_changes(stage: Stage) -> None:
    stage.story.intend(A)
    limits = {"closed": "", "times": [[7200.0, "partition boost"]], "nodes": [], "jobs": [], "windows": []}
    for told in (limits, limits, {**limits, "closed": "partition boost is DOWN"}):
        stage.take(Learn(A), {"ok": True, "limits": told})
    assert [facts["limits"]["closed"] for facts in stage.logged(kinds.SITE_LIMITS)] == [
        "",
        "partition boost is DOWN",
    ]
    assert stage.site.asked[0]["keys"] == [key(A)]
    assert A in stage.actor.asked


def test_a_site_that_cannot_tell_limits_nothing(stage: Stage) -> None:
    stage.take(Learn(A), {"ok": False, "error": "limits: no"})
    assert stage.logged(kinds.SITE_LIMITS) == []
    assert A in stage.actor.asked, "or it would be asked for ever"


def test_an_exclusion_counts_when_slurm_has_heard_it(stage: Stage) -> None:
    stage.story.intend(A).job(A, "pending")
    action = Exclude(A, key(A), ("n2",))
    assert stage.take(action, {"ok": False, "error": "exclude: scontrol: no"}) < 60
    assert stage.take(action, {"ok": True, "excluded": []}) < 60, "it does not wait any more, or not yet"
    assert stage.logged(kinds.NODES_EXCLUDED) == []
    stage.take(action, {"ok": True, "excluded": ["7"]})
    assert stage.logged(kinds.NODES_EXCLUDED) == [{"site": A, "key": key(A), "nodes": ["n2"]}]


def test_a_new_reason_to_wait_is_news_and_an_old_one_is_not(stage: Stage, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    campaign = Campaign(RUN, stage.store, stage.ledger, folder, stage.actor.sites)
    stage.story.intend(A)
    campaign.state = stage.state
    waiting = {"state": "pending", "job_id": "7", "reason": "Priority"}
    for reason in ("Priority", "Resources", "PartitionTimeLimit", "PartitionTimeLimit", "Priority"):
        campaign._observe(A, key(A), {**waiting, "reason": reason}, everything_read=True)
        campaign.state = stage.state
    told = [facts["reason"] for facts in stage.logged(kinds.JOB_OBSERVED)]
    campaign.close()
    assert told == ["Priority", "PartitionTimeLimit", "Priority"]
