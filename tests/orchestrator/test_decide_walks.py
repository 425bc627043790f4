"""Whatever sites, crashes and operators do: decisions never break a law, and every run can end.

`World` plays the sites and the part of actions.py that writes the log, faults included. Moves are drawn
at random; after each, the decisions are checked against the laws, and some of them are carried out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.decide import (
    Action,
    Close,
    Collect,
    Deliver,
    Drain,
    End,
    Facts,
    GiveUp,
    Intend,
    Release,
    Settle,
    Submit,
    decide,
)
from orchestrator.state import RunState
from tests.orchestrator.story import A, B, Story, key

SITES = (A, B)
LAG = {A: 5.0, B: 20.0}


@dataclass
class World:
    """What is true at the sites, beside what the log tells of it."""

    story: Story = field(default_factory=Story)
    jobs: dict[str, str] = field(default_factory=dict)  # key -> pending, running, ended
    submitted: dict[str, float] = field(default_factory=dict)  # a site may not know a job yet, within its lag
    absent: dict[str, tuple[float, float]] = field(default_factory=dict)  # key -> first and last denial
    rounds: Counter[str] = field(default_factory=Counter)  # site -> rounds it has contributed to

    # ---- deciding

    def decisions(self) -> list[Action]:
        state = self.story.state
        absent = {key: last - first for key, (first, last) in self.absent.items()}
        facts = Facts(self.story.clock, absent, LAG)
        actions = decide(state, facts)
        assert decide(state, facts) == actions
        assert len(set(actions)) == len(actions)
        for action in actions:
            self.check(action, state)
        return actions

    def check(self, action: Action, state: RunState) -> None:
        """The laws, as far as one action can break them."""
        assert state.outcome is None
        if isinstance(action, Intend):
            island = state.islands[action.site]
            assert all(s.over for s in island.segments), "a chain has one segment at a time"
            assert not state.stop_requested
            assert not island.done
            assert action.sequence == len(island.segments)
            saved = [s.checkpoints for s in island.segments[island.forgiven :] if s.settled is not None]
            assert sum(saved[-2:]) or len(saved) < 2, "law 3"
        elif isinstance(action, (Submit, Release)):
            assert action.key not in self.jobs, "law 2: it was submitted, and is submitted or released again"
            assert not state.segment(action.key).over
        elif isinstance(action, Settle):
            assert self.jobs[action.key] == "ended"
            assert state.segment(action.key).settled is None
        elif isinstance(action, Drain):
            assert state.stop_requested
        elif isinstance(action, Close):
            assert action.number == len(state.closed) + 1, "law 7: rounds close in order, once"
            assert action.sites == tuple(sorted(action.sites)) != ()
            assert all((action.number, site) in state.collected for site in action.sites)
            assert not any((action.number, site) in state.refused for site in action.sites)
            assert not {*action.sites} & {*action.missing}
        elif isinstance(action, Deliver):
            assert (action.number, action.site) not in state.delivered
        elif isinstance(action, End):
            assert all(s.over for i in state.islands.values() for s in i.segments)

    # ---- carrying out; `luck` 0 is a good day, 1 and 2 lose an answer after or before the deed

    def take(self, action: Action, luck: int) -> None:
        story = self.story
        if isinstance(action, Intend):
            story.intend(action.site, sequence=action.sequence)
            self.submit(action.site, action.sequence, luck)
        elif isinstance(action, Submit):
            self.absent.pop(action.key, None)
            self.submit(action.site, story.state.segment(action.key).sequence, luck)
        elif isinstance(action, Settle):
            story.add(kinds.SEGMENT_SETTLED, site=action.site, key=action.key)
        elif isinstance(action, Release):
            story.add(kinds.SEGMENT_RELEASED, site=action.site, key=action.key)
        elif isinstance(action, GiveUp):
            story.add(kinds.ISLAND_GIVEN_UP, site=action.site, reason=action.reason)
        elif isinstance(action, Collect):
            kind = kinds.UPDATE_REFUSED if luck == 1 else kinds.UPDATE_COLLECTED
            story.add(kind, number=action.number, site=action.site)
        elif isinstance(action, Close):
            story.close(*action.sites, missing=action.missing)
        elif isinstance(action, Deliver):
            story.add(kinds.ROUND_DELIVERED, number=action.number, site=action.site)
        elif isinstance(action, End):
            story.add(kinds.RUN_ENDED, outcome=action.outcome, reason=action.reason)

    def submit(self, site: str, sequence: int, luck: int) -> None:
        if luck == 2:
            return
        name = key(site, sequence)
        self.submitted.setdefault(name, self.story.clock)
        self.jobs.setdefault(name, "pending")
        if luck == 0:
            self.story.job(site, self.jobs[name], sequence)

    # ---- what happens at a site

    def poll(self, site: str) -> None:
        for segment in self.story.state.islands[site].segments:
            if segment.over:
                continue
            young = self.story.clock - self.submitted.get(segment.key, 0.0) < LAG[site]
            if segment.key not in self.jobs or (young and segment.job["state"] == "intended"):
                first, _ = self.absent.get(segment.key, (self.story.clock, 0.0))
                self.absent[segment.key] = (first, self.story.clock)
            else:
                self.absent.pop(segment.key, None)
                if self.jobs[segment.key] != segment.job["state"]:
                    self.story.job(site, self.jobs[segment.key], segment.sequence)

    def work(self, site: str, what: str) -> None:
        """The newest job of a site gets on, if it can."""
        segments = [s for s in self.story.state.islands[site].segments if s.key in self.jobs]
        if not segments or self.jobs[segments[-1].key] == "ended":
            return
        segment = segments[-1]
        if self.jobs[segment.key] == "pending":
            self.jobs[segment.key] = "running"
        elif what == "checkpoint":
            self.story.add(site_kinds.CHECKPOINT_SAVED, at=site, segment=segment.sequence)
        elif what == "contribute":
            self.rounds[site] += 1
            self.story.contribute(site, number=self.rounds[site], sequence=segment.sequence)
        else:
            outcome = "completed" if what == "complete" else "drained"
            self.story.add(site_kinds.TRAINING_ENDED, at=site, segment=segment.sequence, outcome=outcome)
            self.jobs[segment.key] = "ended"

    def operate(self, what: str) -> None:
        ended = self.story.state.outcome is not None
        if what == "stop" and not ended:
            self.story.add(kinds.STOP_REQUESTED)
        elif what == "resume":
            self.story.add(kinds.RUN_RESUMED)

    def move(self, what: str, site: str, luck: int) -> None:
        if what == "act":
            for action in self.decisions()[: luck + 1]:
                self.take(action, luck)
                if luck:  # the coordinator dies; the next one decides anew
                    break
        elif what == "poll":
            self.poll(site)
        elif what == "wait":
            self.story.clock += 10.0 ** (luck + 1)
        elif what in ("stop", "resume"):
            self.operate(what)
        else:
            self.work(site, what)


MOVES = ("act", "poll", "wait", "checkpoint", "contribute", "complete", "drain", "stop", "resume")
moves = st.tuples(st.sampled_from(MOVES), st.sampled_from(SITES), st.integers(0, 2))


@given(st.lists(moves, max_size=60))
def test_no_walk_breaks_a_law_and_every_walk_can_end(walk: list[tuple[str, str, int]]) -> None:
    world = World()
    for what, site, luck in walk:
        world.move(what, site, luck)
        world.decisions()
    for _ in range(60):  # from here on all is well
        for site in SITES:
            world.poll(site)
            world.work(site, "complete")
        world.story.clock += 30.0
        for action in world.decisions():
            world.take(action, luck=0)
    assert world.story.state.outcome in ("completed", "stopped", "failed")
