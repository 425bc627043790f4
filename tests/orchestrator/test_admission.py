"""Limits, caps and maintenance: when a chain's next segment may be submitted, for how long, and from when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.site import load_sites
from clusters.windows import Window
from orchestrator import kinds
from orchestrator.admission import MARGIN_SECONDS, Admission, Place, admit, place_of, plan_reasons, worthwhile
from orchestrator.choices import Action, Drain, GiveUp, Hold, Intend, Learn
from orchestrator.decide import Facts, decide
from orchestrator.status import status
from tests.orchestrator.story import A, B, Story, key

HOUR = 3600.0
PLAN = {"time_limit_seconds": 4 * HOUR, "drain_seconds": 60.0}
SLURM = Place(queues=True)
NOW = 1_000_000.0


def admitted(place: Place = SLURM, *, start: float = NOW, there: int = 0, **limits: Any) -> Admission:
    return admit(PLAN, limits, place, start=start, there=there)


def window(begins: float, lasts: float = 8 * HOUR, *, by_slurm: bool = False) -> Window:
    return Window(NOW + begins, NOW + begins + lasts, "repair", by_slurm)


def told(*windows: Window) -> list[dict[str, Any]]:
    return [{"start": w.start, "end": w.end, "name": w.name} for w in windows]


# ---- limits


def test_nothing_known_limits_nothing() -> None:
    assert admitted() == Admission(4 * HOUR)


def test_a_shorter_limit_makes_it_shorter() -> None:
    found = admitted(times=[(9 * HOUR, "QOS long"), (2 * HOUR, "QOS normal")])
    assert found == Admission(2 * HOUR, reason="QOS normal allows 2h")


def test_a_limit_that_leaves_nothing_worth_a_start_ends_the_chain() -> None:
    found = admitted(times=[(300.0, "QOS brief")])
    assert found.never == "QOS brief allows 5min; less than 15min is not worth a start"


def test_a_closed_partition_is_waited_for() -> None:
    assert admitted(closed="partition boost is DOWN").wait == "partition boost is DOWN"


def test_more_nodes_than_a_job_may_have_are_never_given() -> None:
    found = admit({**PLAN, "nodes": 2}, {"nodes": [(1, "QOS debug")]}, SLURM, start=NOW, there=0)
    assert found.never == "QOS debug lets a job have 1 nodes; this one needs more"
    assert admitted(nodes=[(1, "QOS debug")]).never == ""


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_a_chain_never_exceeds_a_cap(most: int, others: int, there: int) -> None:
    found = admitted(jobs=[(most, others, "QOS normal (MaxSubmitPU)")], there=there)
    assert bool(found.wait) == (others + there + 1 > most)
    by_catalogue = admitted(Place(True, most_jobs=most), there=there)
    assert bool(by_catalogue.wait) == (there + 1 > most)


def test_a_cap_says_whose_it_is() -> None:
    found = admitted(jobs=[(2, 2, "QOS normal (MaxSubmitPU)")])
    assert found.wait == (
        "QOS normal (MaxSubmitPU) allows 2 jobs at a time; 2 others and 0 of this chain are there"
    )


# ---- windows


def test_a_segment_is_shortened_to_end_before_a_window() -> None:
    found = admitted(windows=told(window(2 * HOUR)))
    assert found.time_limit == 2 * HOUR - MARGIN_SECONDS
    assert found.begin == 0.0
    assert found.reason.startswith("ends before repair from ")


def test_where_that_is_not_worthwhile_it_waits() -> None:
    """Slurm holds a job until its own reservation is over; of the operator's windows it must be told."""
    soon = window(600.0)
    by_slurm = admitted(windows=told(soon))
    assert (by_slurm.time_limit, by_slurm.begin) == (4 * HOUR, 0.0)
    assert by_slurm.reason.startswith("waits for the end of repair")
    by_operator = admitted(Place(True, windows=(soon,)))
    assert (by_operator.time_limit, by_operator.begin) == (4 * HOUR, soon.end)
    assert admitted(Place(False, windows=(soon,))).wait == by_operator.reason, "nobody holds a job there"


def test_between_two_windows_there_may_be_room() -> None:
    first, second = window(0.0, HOUR), window(3 * HOUR, HOUR)
    found = admitted(Place(True, windows=(second, first)))
    assert (found.begin, found.time_limit) == (first.end, 2 * HOUR - MARGIN_SECONDS)


def test_a_window_that_is_over_or_far_away_changes_nothing() -> None:
    place = Place(True, windows=(window(-9 * HOUR), window(4 * HOUR + MARGIN_SECONDS)))
    assert admitted(place) == Admission(4 * HOUR)


spans = st.tuples(st.floats(-9 * HOUR, 99 * HOUR), st.floats(60.0, 20 * HOUR))


@given(st.lists(spans, max_size=4), st.lists(spans, max_size=4), st.floats(0, 9 * HOUR))
def test_no_segment_runs_into_a_window_that_slurm_does_not_know(
    own: list[tuple[float, float]], slurms: list[tuple[float, float]], later: float
) -> None:
    place = Place(True, windows=tuple(window(*span) for span in own))
    slurm = [window(*span, by_slurm=True) for span in slurms]
    found = admitted(place, start=NOW + later, windows=told(*slurm))
    begins = max(found.begin, NOW + later)
    ends = begins + found.time_limit
    assert worthwhile(PLAN) <= found.time_limit <= 4 * HOUR
    for one in place.windows:  # Slurm moves a job that would run into one of its own
        held_by_slurm = any(w.start < ends + MARGIN_SECONDS and begins < w.end for w in slurm)
        assert held_by_slurm or ends <= one.start or one.end <= begins


# ---- in a chain


def due(story: Story, place: Place = SLURM, age: float = 0.0, *, later: float = 0.0) -> list[Action]:
    places, ages = {A: place}, ({A: age} if age >= 0 else {})
    facts = Facts(story.clock + later, {}, {A: 5.0, B: 5.0}, {A: 1}, {}, places, ages)
    return decide(story.state, facts)


def alone() -> Story:
    return Story(rounds=None).start(B).end(B).settle(B)


def knows(story: Story, **limits: Any) -> Story:
    story.add(kinds.SITE_LIMITS, site=A, limits=limits)
    return story


def test_a_site_is_asked_before_something_is_submitted_to_it() -> None:
    assert due(alone(), age=-1) == [Learn(A)]
    assert due(alone(), age=3601.0) == [Learn(A)], "what it told an hour ago may have changed"
    assert due(alone()) == [Intend(A, 0)]
    assert due(alone(), Place(queues=False), age=-1) == [Intend(A, 0)]


def test_why_it_waits_is_said_once_and_does_not_end_the_run() -> None:
    story = knows(alone(), closed="partition boost is DOWN")
    assert due(story) == [Hold(A, "partition boost is DOWN")]
    story.add(kinds.SUBMISSION_HELD, site=A, reason="partition boost is DOWN")
    assert due(story) == []
    a = status(story.state, None)["islands"][0]
    assert (a["held"], a["activity"]) == ("partition boost is DOWN", "waiting: partition boost is DOWN")
    assert due(knows(story)) == [Intend(A, 0)]


def test_what_is_intended_no_longer_waits() -> None:
    story = alone()
    story.add(kinds.SUBMISSION_HELD, site=A, reason="full")
    assert story.intend(A).state.islands[A].held == ""


def test_what_sbatch_held_back_no_longer_waits_when_it_is_queued() -> None:
    story = alone().intend(A)
    story.add(kinds.SUBMISSION_HELD, site=A, reason="full")
    assert story.state.islands[A].held == "full"
    assert story.job(A, "pending").state.islands[A].held == ""


def test_what_can_never_run_gives_the_island_up() -> None:
    story = knows(alone(), times=[(60.0, "QOS tiny")])
    (action,) = due(story)
    assert isinstance(action, GiveUp)
    assert action.reason.startswith("QOS tiny allows")


def test_an_intention_carries_its_limit_and_its_reason() -> None:
    story = knows(alone(), times=[(1200.0, "QOS normal")])
    assert due(story) == [Intend(A, 0, "", 1200.0, 0.0, "QOS normal allows 20min")]


def at_work() -> Story:
    """A segment of half an hour that trains too slowly to suffice."""
    return alone().start(A).train(A, 1, 10, seconds=600.0)


def test_a_cap_holds_back_what_would_be_queued_ahead() -> None:
    assert due(at_work()) == [Intend(A, 1, after=key(A))]
    story = knows(at_work(), jobs=[(1, 0, "QOS normal (MaxSubmitPU)")])
    assert [type(action) for action in due(story)] == [Hold]
    assert "training" in story.state.islands[A].activity


def test_what_is_queued_ahead_is_planned_from_the_end_of_the_one_before() -> None:
    """The window is after the running segment, and within the next one."""
    story = at_work()
    began = story.state.segment(key(A)).job["started"]
    opens = began + 1800.0 + 1500.0
    (action,) = due(knows(story, windows=[{"start": opens, "end": opens + 60, "name": "m"}]))
    assert isinstance(action, Intend)
    assert action.time_limit == (1500.0 - MARGIN_SECONDS) // 60 * 60


@pytest.mark.parametrize(
    ("opens", "drains"), [(1200.0, True), (1799.0, True), (1801.0, False), (-60.0, False)]
)
def test_a_running_segment_saves_before_a_window_that_came_up_later(opens: float, drains: bool) -> None:
    story = at_work()
    began = story.state.segment(key(A)).job["started"]
    place = Place(True, windows=(Window(began + opens, began + 9999.0, "m"),))
    early = began + opens - story.clock - 200.0
    assert Drain(A, key(A)) not in due(story, place, later=early)
    just_in_time = began + opens - story.clock - 170.0
    assert (Drain(A, key(A)) in due(story, place, later=just_in_time)) == drains


def test_a_plan_tells_what_is_known_beforehand() -> None:
    place = Place(True, 1, (window(-99.0, 9.0), window(HOUR)))
    capped, repair = plan_reasons(place, 1, NOW)
    assert capped == "the catalogue knows a limit of 1 jobs at a time: no more are queued ahead"
    assert repair.startswith("repair from ")
    assert repair.endswith(": segments end before it, or begin after it")
    assert list(plan_reasons(Place(True, 2), 1, NOW)) == []


def operators(tmp_path: Path, text: str) -> Place:
    path = tmp_path / "sites.toml"
    path.write_text(text)
    return place_of(next(iter(load_sites(path).values())))


def test_what_the_catalogue_and_the_operator_know_of_jobs_and_windows(tmp_path: Path) -> None:
    repair = "2026-12-01T08:00Z/2026-12-01T09:00Z"
    text = f'[lumi]\nscratch = "/x"\npartition = "dev-g"\nmaintenance = ["{repair}"]\n'
    lumi = operators(tmp_path, text)
    assert (lumi.queues, lumi.most_jobs) == (True, 2)
    assert [(w.end - w.start, w.by_slurm) for w in lumi.windows] == [(3600.0, False)]
    assert operators(tmp_path, '[local]\nscratch = "/x"\n') == Place()
    with pytest.raises(ValueError, match=r"\[lumi\] maintenance: 'today' has no /; write beginning and end"):
        operators(tmp_path, '[lumi]\nscratch = "/x"\nmaintenance = ["today"]\n')
