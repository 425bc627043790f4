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
from orchestrator.choices import (
    Action,
    Cancel,
    Close,
    Collect,
    Deliver,
    Drain,
    End,
    GiveUp,
    Intend,
    Release,
    Settle,
    Submit,
)
from orchestrator.decide import Facts, decide
from orchestrator.fold import apply
from orchestrator.state import IslandState, RunState
from tests.orchestrator.story import RUN, A, B, Story, key, plan

SITES = (A, B)
LOGGED: dict[type, str] = {
    Settle: kinds.SEGMENT_SETTLED,
    Release: kinds.SEGMENT_RELEASED,
    GiveUp: kinds.ISLAND_GIVEN_UP,
    Collect: kinds.UPDATE_COLLECTED,
    Deliver: kinds.ROUND_DELIVERED,
    End: kinds.RUN_ENDED,
}
UNLUCKY = {kinds.UPDATE_COLLECTED: kinds.UPDATE_REFUSED}
LAG = {A: 5.0, B: 20.0}


def fruitless(island: IslandState) -> bool:
    """Whether the last two segments that cost something saved no checkpoint."""
    saved = [s.checkpoints for s in island.segments[island.forgiven :] if s.settled is not None]
    return saved[-2:] == [0, 0]


@dataclass
class World:
    """What is true at the sites, beside what the log tells of it."""

    ahead: int = 0  # segments that A keeps queued behind another
    story: Story = field(
        default_factory=lambda: Story(islands=[{**i, "estimated_segments": 5} for i in plan()["islands"]])
    )
    jobs: dict[str, str] = field(default_factory=dict)  # key -> pending, running, ended
    submitted: dict[str, float] = field(default_factory=dict)  # a site may not know a job yet, within its lag
    absent: dict[str, tuple[float, float]] = field(default_factory=dict)  # key -> first and last denial
    rounds: Counter[str] = field(default_factory=Counter)  # site -> rounds it has contributed to

    told: RunState = field(default_factory=lambda: RunState(RUN))
    heard: int = 0  # events that `told` has taken in

    @property
    def state(self) -> RunState:
        """As a coordinator has it: of an event at a time."""
        for event in self.story.events[self.heard :]:
            apply(self.told, event)
        self.heard = len(self.story.events)
        return self.told

    # ---- deciding

    def decisions(self) -> list[Action]:
        state = self.state
        absent = {key: last - first for key, (first, last) in self.absent.items()}
        facts = Facts(self.story.clock, absent, LAG, {A: self.ahead})
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
            waiting = [s for s in island.segments if not s.over]
            assert len(waiting) <= (self.ahead if action.site == A else 0), (
                "a chain has one segment at a time"
            )
            assert not waiting or waiting[-1].live, "law 2"
            assert action.after == (waiting[-1].key if waiting else "")
            assert not state.stop_requested
            assert not island.done
            assert action.sequence == len(island.segments)
            assert not fruitless(island), "law 3"
        elif isinstance(action, (Submit, Release)):
            assert action.key not in self.jobs, "law 2: it was submitted, and is submitted or released again"
            assert not state.segment(action.key).over
        elif isinstance(action, Settle):
            assert self.jobs[action.key] == "ended"
            assert state.segment(action.key).settled is None
        elif isinstance(action, Cancel):
            island = state.islands[action.site]
            assert state.stop_requested or island.done or fruitless(island)
            assert state.segment(action.key).job["state"] == "pending"
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
        """What actions.py would do and log. A Drain is left to chance."""
        if isinstance(action, Intend):
            self.story.intend(action.site, sequence=action.sequence)
            self.submit(action.site, action.sequence, luck)
        elif isinstance(action, Submit):
            self.absent.pop(action.key, None)
            self.submit(action.site, self.state.segment(action.key).sequence, luck)
        elif isinstance(action, Cancel):
            if self.jobs[action.key] == "pending":
                self.jobs[action.key] = "ended"
        elif isinstance(action, Close):
            self.story.close(*action.sites, missing=action.missing)
        elif kind := LOGGED.get(type(action)):
            self.story.add(UNLUCKY.get(kind, kind) if luck == 1 else kind, **vars(action))

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
        for segment in self.state.islands[site].segments:
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
        """The first job of a site that has not ended gets on; those behind it wait."""
        segments = self.state.islands[site].segments
        segment = next((s for s in segments if self.jobs.get(s.key, "ended") != "ended"), None)
        if segment is None:
            return
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
        ended = self.state.outcome is not None
        if what == "stop" and not ended:
            self.story.add(kinds.STOP_REQUESTED)
        elif what == "resume":
            self.story.add(kinds.RUN_RESUMED)

    def good_turn(self) -> None:
        """A turn of the coordinator when every site answers and every action succeeds."""
        for site in SITES:
            self.poll(site)
        for action in self.decisions():
            self.take(action, luck=0)

    def move(self, what: str, site: str, luck: int) -> None:
        if what == "good turn":
            self.good_turn()
        elif what == "act":
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


FREQUENT = ("good turn", "checkpoint", "contribute", "contribute", "wait")
RARE = ("act", "poll", "complete", "drain", "stop", "resume")
moves = st.tuples(st.sampled_from(2 * FREQUENT + RARE), st.sampled_from(SITES), st.integers(0, 2))


@given(st.lists(moves, min_size=15, max_size=60), st.booleans(), st.integers(0, 2))
def test_no_walk_breaks_a_law_and_every_walk_can_end(
    walk: list[tuple[str, str, int]], begun: bool, ahead: int
) -> None:
    world = World(ahead)
    if begun:
        for what in ("good turn", "start"):
            for site in SITES:
                world.move(what, site, 0)
    for what, site, luck in walk:
        world.move(what, site, luck)
        world.decisions()
    for _ in range(60):  # from here on all is well
        for site in SITES:
            world.work(site, "complete")
        world.story.clock += 30.0
        world.good_turn()
    assert world.state == world.story.state
    assert world.state.outcome in ("completed", "stopped", "failed")
