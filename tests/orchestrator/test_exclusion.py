"""Nodes that a chain keeps away from: what counts as evidence, how it is used, how it ends."""

from __future__ import annotations

import pytest

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.choices import Action, Cancel, Exclude
from orchestrator.decide import Facts, decide
from orchestrator.exclusion import LASTS_SECONDS, excluded, to_exclude
from orchestrator.status import status, table
from tests.orchestrator.story import A, B, Story, drawn, key


def at_work(nodes: str = "n[1-2]", hosts: tuple[str, str] = ("n1", "n2")) -> Story:
    """A trains on two nodes."""
    story = Story(rounds=None).start(B).end(B).settle(B)
    story.intend(A).job(A, "pending").job(A, "running", nodes=nodes)
    return generation(story, hosts)


def generation(story: Story, hosts: tuple[str, str] = ("n1", "n2"), sequence: int = 0) -> Story:
    story.add(site_kinds.RANKS_STARTED, at=A, segment=sequence, hosts=list(hosts))
    return story


def death(story: Story, rank: int, sequence: int = 0, **facts: object) -> Story:
    story.add(site_kinds.RANK_DIED, at=A, segment=sequence, rank=rank, **facts)
    return story


def kept_away(story: Story, later: float = 0.0) -> dict[str, list[str]]:
    found = excluded(story.state.islands[A], story.clock + later)
    return {node: [e.text for e in evidence] for node, evidence in found.items()}


# ---- evidence


def test_one_death_excludes_nobody() -> None:
    assert kept_away(death(at_work(), 1)) == {}


def test_two_deaths_on_one_node_without_a_checkpoint_do() -> None:
    story = generation(death(at_work(), 1))
    death(story, 1, signal=None, exit_code=7)
    why = "ranks died there 2 times without a checkpoint in between: rank 1: signal 9; rank 1: exit code 7"
    assert kept_away(story) == {"n2": [why]}


def test_deaths_on_different_nodes_do_not() -> None:
    assert kept_away(death(generation(death(at_work(), 0)), 1)) == {}


def test_a_checkpoint_in_between_is_progress() -> None:
    story = death(at_work(), 1)
    story.add(site_kinds.CHECKPOINT_SAVED, at=A)
    assert kept_away(death(generation(story), 1)) == {}


def test_peers_that_die_of_a_death_blame_nobody() -> None:
    """All four deaths are of two generations, and each began elsewhere."""
    story = death(death(at_work(), 0), 1)
    assert kept_away(death(death(generation(story), 1), 0)) == {}


def test_a_rank_that_tells_its_host_is_believed() -> None:
    """After a replacement on a spare the order of the ranks says nothing about their hosts."""
    story = death(generation(death(at_work(), 0, host="n2")), 0, host="n2")
    assert list(kept_away(story)) == ["n2"]


def test_a_lost_node_is_lost_at_once() -> None:
    story = at_work()
    story.add(site_kinds.NODE_LOST, at=A, host="n1.site.eu", reason="no heartbeat for 5 s")
    assert kept_away(story) == {"n1": ["its supervisor: no heartbeat for 5 s"]}


def test_slurms_own_record_names_it() -> None:
    story = at_work().job(A, "ended", nodes="n1", slurm_state="COMPLETED", lost_nodes=["n2"])
    assert kept_away(story) == {"n2": ["Slurm: job 70 lost it (COMPLETED)"]}


def test_so_does_that_of_an_earlier_incarnation() -> None:
    others = [{"job_id": "70", "lost_nodes": ["n2"], "slurm_state": "NODE_FAIL"}]
    assert kept_away(at_work().job(A, "ended", others=others)) == {
        "n2": ["Slurm: job 70 lost it (NODE_FAIL)"]
    }


@pytest.mark.parametrize("nodes", ["", "m[1-2]", "n[1-"])
def test_what_slurm_did_not_allocate_is_never_named(nodes: str) -> None:
    """A local site has no nodes, and a host's name need not be Slurm's."""
    story = at_work(nodes=nodes)
    story.add(site_kinds.NODE_LOST, at=A, host="n1", reason="gone")
    assert kept_away(death(generation(death(story, 1)), 1)) == {}


def test_evidence_may_come_before_slurm_tells_the_nodes() -> None:
    story = Story().start(A)
    story.add(site_kinds.NODE_LOST, at=A, host="n1", reason="gone")
    assert kept_away(story) == {}
    story.job(A, "ended", nodes="n[1-2]")
    assert list(kept_away(story)) == ["n1"]


def test_the_same_word_is_heard_once() -> None:
    story = at_work()
    for _ in range(2):
        story.job(A, "ended", nodes="n1", slurm_state="NODE_FAIL", lost_nodes=["n2"])
    assert kept_away(story) == {"n2": ["Slurm: job 70 lost it (NODE_FAIL)"]}


# ---- how it ends


def lost() -> Story:
    """The first segment lost n2; the second waits in the queue."""
    story = at_work()
    story.add(site_kinds.NODE_LOST, at=A, host="n2", reason="gone")
    return story.intend(A, sequence=1).job(A, "pending", 1)


def test_it_expires() -> None:
    assert list(kept_away(lost(), LASTS_SECONDS - 10)) == ["n2"]
    assert kept_away(lost(), LASTS_SECONDS + 10) == {}


def test_an_operator_may_trust_a_node_until_it_fails_again() -> None:
    story = lost()
    story.add(kinds.NODE_TRUSTED, site=A, node="n2")
    assert kept_away(story) == {}
    story.add(site_kinds.NODE_LOST, at=A, host="n2", reason="gone")
    assert list(kept_away(story)) == ["n2"]


def test_trust_forgets_a_first_death_too() -> None:
    story = death(at_work(), 1)
    story.add(kinds.NODE_TRUSTED, site=A, node="n2")
    assert kept_away(death(generation(story), 1)) == {}


# ---- how it is used


def due(story: Story, *always: str) -> list[Action]:
    nodes = to_exclude(story.state.islands[A], always, story.clock)
    return decide(story.state, Facts(story.clock, {}, {A: 5.0, B: 5.0}, {A: 1}, {A: nodes}))


def test_a_queued_segment_is_kept_away_once() -> None:
    story = lost()
    assert due(story) == [Exclude(A, key(A, 1), ("n2",))]
    story.add(kinds.NODES_EXCLUDED, site=A, key=key(A, 1), nodes=["n2"])
    assert due(story) == []


def test_it_is_let_back_when_the_node_is_trusted() -> None:
    story = lost()
    story.add(kinds.NODES_EXCLUDED, site=A, key=key(A, 1), nodes=["n2"])
    story.add(kinds.NODE_TRUSTED, site=A, node="n2")
    assert due(story) == [Exclude(A, key(A, 1), ())]


def test_the_operators_own_list_comes_with_it() -> None:
    assert due(lost(), "n9", "n2") == [Exclude(A, key(A, 1), ("n2", "n9"))]


def test_a_segment_that_runs_or_is_not_wanted_is_left_alone() -> None:
    assert due(lost().job(A, "running", 1)) == []
    assert due(lost().job(A, "unknown", 1)) == []
    story = lost()
    story.add(site_kinds.TRAINING_ENDED, at=A, outcome="completed")
    assert due(story) == [Cancel(A, key(A, 1))]


def test_status_shows_it_with_its_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    story = lost()
    monkeypatch.setattr("time.time", lambda: story.clock)
    facts = status(story.state, None)
    a, b = facts["islands"]
    since = story.events[-3].received
    assert a["excluded"] == [
        {"node": "n2", "since": since, "until": since + LASTS_SECONDS, "evidence": ["its supervisor: gone"]}
    ]
    assert b["excluded"] == []
    assert f"{A} keeps away from n2 until " in drawn(table(facts))
