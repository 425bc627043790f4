"""What squeue's and sacct's records mean: of a real site, of lag, of silence, of two jobs with one key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.slurm_records import Record, read_sacct, read_squeue
from clusters.slurm_verdict import ABSENT, ENDED, PENDING, RUNNING, UNKNOWN, incarnations, judge, usage
from tests.clusters.test_slurm_records import sample

QUEUE, BOOKS = read_squeue(sample("squeue")), read_sacct(sample("sacct"))
JOB = Record("7", "k", "RUNNING", 100.0, 110.0, None, 0, "cn1", {"node": 1, "gres/gpu": 4}, 10.0)


def of(name: str, records: list[Record]) -> list[Record]:
    return [r for r in records if r.name == name]


def verdict(name: str) -> dict[str, Any]:
    return judge(of(name, QUEUE), of(name, BOOKS))


@pytest.mark.parametrize(
    ("name", "state", "outcome", "exit_code"),
    [
        ("done", ENDED, "completed", 0),
        ("exit3", ENDED, "failed", 3),
        ("killed", ENDED, "failed", 137),
        ("limit", ENDED, "timeout", 0),
        ("cancelled", ENDED, "cancelled", 0),
        ("evicted", ENDED, "cancelled", 0),
        ("lost_for_good", ENDED, "failed", 0),
        ("dep1", ENDED, "cancelled", 0),
    ],
)
def test_jobs_of_a_real_site_that_ended(name: str, state: str, outcome: str, exit_code: int) -> None:
    job = verdict(name)
    assert (job["state"], job["outcome"], job["exit_code"]) == (state, outcome, exit_code)
    assert job["evidence"].startswith("sacct: ")


def test_a_job_that_waits() -> None:
    job = verdict("poor")
    assert (job["state"], job["reason"], job["started"]) == (PENDING, "AssocGrpGRESMinutes", 0.0)
    assert verdict("odd|na,me")["expected_start"] == 1795313076


def test_a_job_cancelled_before_it_began_used_nothing() -> None:
    job = verdict("dep1")
    assert (job["started"], job["elapsed"], job["usage"]) == (0.0, 0.0, {})


def test_an_allocation_that_lost_a_node_is_one_incarnation_and_all_its_use_counts() -> None:
    job = verdict("resized")
    assert (job["submitted"], job["started"], job["ended"]) == (1795309331, 1795309332, 1795309402)
    assert job["elapsed"] == 28 + 42
    assert job["usage"]["gres/gpu"] == 28 * 8 + 42 * 4
    assert job["usage"]["billing"] == 28 * 64 + 42 * 32
    assert job["energy_joules"] == 35052
    assert "others" not in job


def test_the_nodes_that_an_allocation_lost_are_named() -> None:
    assert verdict("resized")["lost_nodes"] == ["cn2"]
    assert verdict("lost_for_good")["lost_nodes"] == [verdict("lost_for_good")["nodes"]]
    assert "lost_nodes" not in verdict("done")


@pytest.mark.parametrize(("nodes", "lost"), [("cn3", ["cn3"]), ("cn[3-4]", []), ("cn[3", []), ("", [])])
def test_a_lost_allocation_names_its_node_if_it_had_but_one(nodes: str, lost: list[str]) -> None:
    """Of several any may have been the one: nobody is blamed."""
    ended = replace(JOB, state="NODE_FAIL", nodes=nodes, ended=120.0)
    assert judge([], [ended]).get("lost_nodes", []) == lost


def test_a_requeued_job_waits_and_its_first_incarnation_counts_too() -> None:
    job = verdict("rq")
    assert (job["state"], job["submitted"]) == (PENDING, 1795309481)
    assert [(o["submitted"], o["slurm_state"], o["elapsed"]) for o in job["others"]] == [
        (1795309476, "REQUEUED", 5)
    ]


def test_a_preempted_job_that_ran_again() -> None:
    job = verdict("victim")
    assert (job["outcome"], job["elapsed"]) == ("completed", 10)
    assert [(o["slurm_state"], o["elapsed"]) for o in job["others"]] == [("PREEMPTED", 9)]


def test_of_two_jobs_with_one_key_the_one_that_runs() -> None:
    job = verdict("double")
    assert (job["state"], job["job_id"]) == (RUNNING, "12")
    assert [o["job_id"] for o in job["others"]] == ["11"]


def test_of_two_jobs_with_one_key_the_one_that_claimed_it() -> None:
    job = judge(of("double", QUEUE), of("double", BOOKS), owner="11")
    assert (job["state"], job["job_id"], job["outcome"]) == (ENDED, "11", "completed")
    assert [o["job_id"] for o in job["others"]] == ["12"]
    later = replace(JOB, job_id="8", state="FAILED", submitted=105.0, ended=120.0)
    for queue, books in (([later, JOB], []), ([], [later, replace(JOB, state="COMPLETED", ended=130.0)])):
        assert judge(queue, books, owner="7")["job_id"] == "7"
        assert judge(queue, books)["job_id"] == ("7" if queue else "8")
    assert judge([later], [], owner="7")["job_id"] == "8", "Slurm no longer knows the owner"


# ---- one of them is silent, or behind


@pytest.mark.parametrize(
    ("queue", "books", "state", "evidence"),
    [
        ([], [], ABSENT, "squeue and sacct know no such job"),
        (None, [], UNKNOWN, "no answer from squeue"),
        ([], None, UNKNOWN, "no answer from sacct"),
        (None, None, UNKNOWN, "no answer from squeue and sacct"),
        ([JOB], None, RUNNING, "squeue: RUNNING"),
        ([JOB], [], RUNNING, "squeue: RUNNING"),
        ([], [JOB], UNKNOWN, "sacct says RUNNING, squeue knows no such job"),
        (None, [JOB], UNKNOWN, "sacct says RUNNING, squeue does not answer"),
        ([], [replace(JOB, state="COMPLETED", ended=120.0)], ENDED, "sacct: COMPLETED"),
        (None, [replace(JOB, state="COMPLETED", ended=120.0)], ENDED, "sacct: COMPLETED"),
        (None, [replace(JOB, state="NODE_FAIL")], UNKNOWN, "sacct says NODE_FAIL, squeue does not answer"),
        ([], [replace(JOB, state="NODE_FAIL")], ENDED, "sacct: NODE_FAIL"),
        ([replace(JOB, state="REQUEUED")], [], PENDING, "squeue: REQUEUED"),
        ([replace(JOB, state="SOMETHING_NEW")], [], UNKNOWN, "squeue: SOMETHING_NEW"),
    ],
)  # fmt: skip
def test_silence_and_doubt(
    queue: list[Record] | None, books: list[Record] | None, state: str, evidence: str
) -> None:
    answer = judge(queue, books)
    assert (answer["state"], answer["evidence"]) == (state, evidence)


def test_an_end_that_is_not_booked_yet_is_counted_from_the_queue() -> None:
    over = replace(JOB, state="FAILED", ended=150.0, elapsed=40.0, exit_code=3)
    for books in (None, [], [replace(JOB, elapsed=12.0)]):
        job = judge([over], books)
        assert (job["state"], job["elapsed"], job["usage"]["gres/gpu"]) == (ENDED, 40.0, 160.0)
        assert (job["exit_code"], job["ended"], job["started"]) == (3, 150.0, 110.0)


def test_an_end_that_is_not_booked_yet_of_an_allocation_that_lost_a_node() -> None:
    first = replace(JOB, state="RESIZING", ended=130.0, elapsed=20.0, tres={"node": 2})
    second = replace(JOB, submitted=130.0, started=130.0, elapsed=5.0)
    over = replace(JOB, state="COMPLETED", ended=150.0, elapsed=40.0, tres={"node": 1})
    job = judge([over], [second, first])
    assert (job["elapsed"], job["usage"]["node"]) == (40.0, 20 * 2 + 20 * 1)
    assert "others" not in job


def test_an_end_is_unknown_while_the_part_after_a_lost_node_is_not_booked() -> None:
    """Else the whole time would be charged for the node that was lost early."""
    first = replace(JOB, state="RESIZING", ended=130.0, elapsed=20.0, tres={"node": 2})
    over = replace(JOB, state="COMPLETED", ended=150.0, elapsed=40.0, tres={"node": 1})
    job = judge([over], [first])
    assert (job["state"], job["usage"]["node"]) == (UNKNOWN, 20 * 2)
    assert "sacct has not booked" in job["evidence"]


RECORDS = st.builds(
    Record,
    job_id=st.sampled_from(["1", "2"]),
    name=st.just("k"),
    state=st.sampled_from(["PENDING", "RUNNING", "RESIZING", "COMPLETED", "REQUEUED", "NODE_FAIL", "NEW"]),
    submitted=st.integers(1, 4).map(float),
    started=st.none() | st.integers(1, 9).map(float),
    ended=st.none() | st.integers(1, 9).map(float),
    exit_code=st.just(0),
    nodes=st.sampled_from(["", "cn1"]),
    tres=st.just({"node": 1.0}),
    elapsed=st.integers(0, 9).map(float),
)
SOME = st.none() | st.lists(RECORDS, max_size=5)


@given(SOME, SOME)
def test_absent_only_where_both_have_answered_and_know_nothing(
    queue: list[Record] | None, books: list[Record] | None
) -> None:
    answer = judge(queue, books)
    assert (answer["state"] == ABSENT) == (queue == [] and books == [])
    assert answer["evidence"]
    if answer["state"] == ENDED:
        assert {"outcome", "exit_code", "ended", "started", "elapsed", "usage"} <= set(answer)


@given(st.lists(RECORDS, max_size=8))
def test_no_record_is_lost_or_counted_twice(records: list[Record]) -> None:
    parts = [part for incarnation in incarnations(records) for part in incarnation.parts]
    assert sorted(map(id, parts)) == sorted(map(id, records))
    total = sum(i.facts()["elapsed"] for i in incarnations(records))
    assert total == sum(r.elapsed for r in records) == usage(records).get("node", 0.0)
