"""Closed rounds: the same for everyone, whoever wrote them down, and chained by their identity."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.rounds import ClosedRound, Contribution, genesis

contributions = st.lists(
    st.builds(Contribution, site=st.text(max_size=5), tokens=st.integers(0), sha256=st.text(max_size=5)),
    max_size=4,
    unique_by=lambda part: part.site,
)
sites = st.lists(st.text(max_size=5), max_size=2, unique=True).map(tuple)
rounds = st.builds(
    ClosedRound,
    st.text(max_size=5),
    st.integers(1),
    st.text(max_size=5),
    contributions.map(tuple),
    discarded=sites,
    reset_from=st.text(max_size=5),
)
PARTS = (Contribution("a", 10, "1" * 64), Contribution("b", 20, "2" * 64))


@given(rounds)
def test_reads_back_as_written(closed: ClosedRound) -> None:
    again = ClosedRound.from_json(closed.to_json())
    assert again == closed
    assert again.identity == closed.identity


@given(rounds, st.randoms())
def test_the_order_in_which_updates_came_does_not_matter(closed: ClosedRound, random: Any) -> None:
    parts = list(closed.contributions)
    random.shuffle(parts)
    sites = list(closed.discarded)
    random.shuffle(sites)
    other = replace(closed, contributions=tuple(parts), discarded=tuple(sites))
    assert other == closed
    assert other.identity == closed.identity
    assert [c.site for c in other.contributions] == sorted(c.site for c in parts)


def test_the_identity_of_a_round_stays_what_it_is() -> None:
    """Islands of one run may be of different versions: a changed identity would break their chain."""
    assert genesis("run") == "82a07570128cd004d45e0295f0d828fcf9665034d2de8b01429892891182c41d"
    assert (
        ClosedRound("run", 1, genesis("run"), PARTS).identity
        == "3e47794bfc5817117d1b4f8097e353c2fc41e0e388cfee0be25ab799c0c5e2d2"
    )


def test_every_fact_of_a_round_is_part_of_its_identity() -> None:
    base = genesis("run")
    different = [
        ClosedRound("run", 1, base, PARTS),
        ClosedRound("other", 1, base, PARTS),
        ClosedRound("run", 2, base, PARTS),
        ClosedRound("run", 1, genesis("other"), PARTS),
        ClosedRound("run", 1, base, PARTS[:1]),
        ClosedRound("run", 1, base, (PARTS[0], Contribution("b", 21, "2" * 64))),
        ClosedRound("run", 1, base, (PARTS[0], Contribution("b", 20, "3" * 64))),
        ClosedRound("run", 1, base, (PARTS[0], Contribution("c", 20, "2" * 64))),
    ]
    assert len({closed.identity for closed in different}) == len(different)


GOOD = json.loads(ClosedRound("run", 1, "base", PARTS).to_json())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ('{"run": ', "Expecting value"),
        ("[]", "list indices"),
        ("null", "NoneType"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "number"}), "'number'"),
        (json.dumps({**GOOD, "contributions": [{"site": "a", "tokens": 1}]}), "'sha256'"),
        (json.dumps({**GOOD, "contributions": [{**GOOD["contributions"][0], "colour": 1}]}), "'colour'"),
        (json.dumps({**GOOD, "contributions": 5}), "'int'"),
        (json.dumps({**GOOD, "discarded": 5}), "'int'"),
    ],
)
def test_what_is_no_closed_round(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^not a closed round: .*{why}"):
        ClosedRound.from_json(text)
