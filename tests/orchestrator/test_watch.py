from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.events import COMPLETED, DRAINED, STARVED
from clusters.segment import EXIT_BAD_INPUT, EXIT_COMPLETED, EXIT_DRAINED, EXIT_STARVED
from orchestrator.watch import (
    End,
    Place,
    bad_input,
    drain_reason,
    judge,
    rank_environments,
    replacements,
    units,
)
from tests.orchestrator.segments import segment

CLEAN_CODES = [EXIT_COMPLETED, EXIT_DRAINED, EXIT_STARVED]


def ended(rank: int, code: int | None, by: int | None = None, time: float = 100.0, note: str = "") -> End:
    return End(rank, 1000 + rank, code, by, time, note)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(0, COMPLETED), (80, DRAINED), (81, STARVED), (1, None), (2, None), (79, None), (None, None)],
)
def test_only_three_exit_codes_are_clean(code: int | None, outcome: str | None) -> None:
    assert ended(0, code).outcome == outcome


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (ended(3, 1), "rank 3 (process 1003) ended with exit code 1"),
        (ended(3, None, 9), "rank 3 (process 1003) was killed by SIGKILL"),
        (ended(3, None, note="was lost: its node died"), "rank 3 (process 1003) was lost: its node died"),
    ],
)
def test_an_end_is_told_in_one_line(end: End, text: str) -> None:
    assert str(end) == text


@given(st.integers(1, 8), st.integers(0, 8), st.sampled_from(CLEAN_CODES))
def test_the_island_has_ended_when_all_its_ranks_have(ranks: int, ended_so_far: int, code: int) -> None:
    ends = [ended(rank, code) for rank in range(min(ended_so_far, ranks))]
    verdict = judge(ends, ranks, now=100.0, patience=5.0)
    if len(ends) < ranks:
        assert verdict is None
    else:
        assert verdict is not None
        assert verdict.outcome == ended(0, code).outcome


@given(
    st.lists(st.sampled_from([0, 1, 80, 81, 139]), min_size=1, max_size=8).filter(
        lambda codes: {1, 139} & {*codes}
    ),
    st.integers(0, 3),
)
def test_the_first_failure_replaces_all_ranks(codes: list[int], missing: int) -> None:
    ends = [ended(rank, code) for rank, code in enumerate(codes)]
    verdict = judge(ends, len(ends) + missing, now=100.0, patience=5.0)
    culprit = next(rank for rank, code in enumerate(codes) if code in (1, 139))
    assert verdict is not None
    assert verdict.outcome is None
    assert verdict.culprit == culprit
    assert verdict.reason == str(ends[culprit])


@given(st.permutations([1, 139, 82, 0]))
def test_bad_input_is_found_wherever_it_is_heard_of(codes: list[int]) -> None:
    """Peers die of the end of the rank that found it, and may be heard of before it."""
    ends = [ended(rank, code) for rank, code in enumerate(codes)]
    assert bad_input(ends) == ends[codes.index(EXIT_BAD_INPUT)]
    assert bad_input([end for end in ends if end.exit_code != EXIT_BAD_INPUT]) is None


def test_ranks_must_agree_on_how_they_end() -> None:
    verdict = judge([ended(0, 0), ended(1, 80)], 3, now=100.0, patience=5.0)
    assert verdict is not None
    assert verdict.outcome is None
    assert verdict.reason.startswith("ranks disagree: rank 0 ")


def test_who_stays_behind_hangs() -> None:
    ends = [ended(0, 0, time=100.0), ended(2, 0, time=104.0)]
    assert judge(ends, 4, now=105.0, patience=5.0) is None
    verdict = judge(ends, 4, now=105.1, patience=5.0)
    assert verdict is not None
    assert (verdict.outcome, verdict.culprit) == (None, 1)
    assert (
        verdict.reason == "ranks [1, 3] have not ended 5 s after rank 0 (process 1000) ended with exit code 0"
    )


def test_so_many_replacements_without_a_checkpoint_are_allowed() -> None:
    assert replacements(0, saved=False, allowed=2) == 1
    assert replacements(1, saved=False, allowed=2) == 2
    assert replacements(2, saved=False, allowed=2) is None
    assert replacements(2, saved=True, allowed=2) == 1
    assert replacements(0, saved=True, allowed=0) is None


@given(st.integers(0, 5), st.integers(6, 30))
def test_without_checkpoints_replacing_ends(allowed: int, deaths: int) -> None:
    count: int | None = 0
    survived = 0
    for _ in range(deaths):
        if count is not None and (count := replacements(count, saved=False, allowed=allowed)) is not None:
            survived += 1
    assert survived == allowed


@pytest.mark.parametrize(
    ("elapsed", "stop", "signalled", "reason"),
    [
        (0.0, False, False, None),
        (0.0, True, False, "stop requested"),
        (0.0, False, True, "signal received"),
        (94.9, False, False, None),
        (95.0, False, False, "time limit of 100 s"),
        (500.0, True, True, "stop requested"),
    ],
)
def test_reasons_to_drain(elapsed: float, stop: bool, signalled: bool, reason: str | None) -> None:
    limited = segment(Path("/scratch"), time_limit_seconds=100.0, drain_seconds=5.0)
    assert drain_reason(limited, elapsed, stop, signalled) == reason


@given(
    st.floats(0.1, 1e4),
    st.floats(0.01, 100.0),
    st.floats(0.0, 600.0),
    st.floats(0.0, 1e5),
    st.floats(0.0, 1e5),
)
def test_the_drain_begins_early_enough_for_the_unit_cap(
    per_hour: float, cap: float, drain: float, elapsed: float, later: float
) -> None:
    capped = segment(
        Path("/scratch"), units_per_hour=per_hour, unit_cap=cap, drain_seconds=drain, time_limit_seconds=1e9
    )
    if drain_reason(capped, elapsed, stop=False, signalled=False) is None:
        assert units(capped, elapsed + drain) < cap, "a drain that began now would end below the cap"
    else:
        assert drain_reason(capped, elapsed + later, stop=False, signalled=False) == f"unit cap of {cap:g}"


def test_units_are_counted_by_the_hour() -> None:
    assert units(segment(Path("/scratch"), units_per_hour=128.0), 1800.0) == 64.0


@given(st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"]), min_size=1, max_size=12))
def test_ranks_are_told_who_they_are(addresses: list[str]) -> None:
    places = [Place(address, 2000 + rank, f"on-{address}") for rank, address in enumerate(addresses)]
    environments = rank_environments(places, 7)
    assert [env["RANK"] for env in environments] == [str(rank) for rank in range(len(addresses))]
    assert {env["WORLD_SIZE"] for env in environments} == {str(len(addresses))}
    assert {(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in environments} == {(addresses[0], "2000")}
    assert {env["EUROTRAIN_GENERATION"] for env in environments} == {"7"}
    for node in set(addresses):
        local = [
            env["LOCAL_RANK"] for env, address in zip(environments, addresses, strict=True) if address == node
        ]
        assert local == [str(index) for index in range(len(local))]
    assert [env["GLOO_SOCKET_IFNAME"] for env in environments] == [f"on-{address}" for address in addresses]
    wanted = [None if len({*addresses}) == 1 else f"=on-{address}" for address in addresses]
    assert [env.get("NCCL_SOCKET_IFNAME") for env in environments] == wanted
    kept = rank_environments(places, 7, told=["NCCL_SOCKET_IFNAME"])
    assert not any("NCCL_SOCKET_IFNAME" in env for env in kept), "the site's own word counts"
