"""What squeue and sacct print: a real Slurm 22.05's words, and anything at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.slurm_records import (
    SACCT_FIELDS,
    SEPARATOR,
    SQUEUE_FIELDS,
    Record,
    read_sacct,
    read_squeue,
)

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    return (SAMPLES / f"slurm-22.05.{name}").read_text()


def queued(**row: str) -> str:
    usual = {"JobID": "1", "Name": "k", "State": "RUNNING", "SubmitTime": "100", "StartTime": "110",
             "EndTime": "N/A", "exit_code": "0", "NodeList": "cn1", "tres-alloc": "cpu=1,node=1",
             "TimeUsed": "0:07", "Reason": "None"}  # fmt: skip
    return SEPARATOR.join({**usual, **row}[name] for name in SQUEUE_FIELDS) + "\n"


def booked(**row: str) -> str:
    usual = {"JobID": "1", "JobName": "k", "State": "COMPLETED", "Submit": "100", "Start": "110",
             "End": "120", "ExitCode": "0:0", "NodeList": "cn1", "AllocTRES": "cpu=1,node=1",
             "ElapsedRaw": "10", "ConsumedEnergyRaw": ""}  # fmt: skip
    return SEPARATOR.join({**usual, **row}[name] for name in SACCT_FIELDS) + "\n"


def test_squeue_of_a_real_site() -> None:
    records = {(r.name, r.job_id): r for r in read_squeue(sample("squeue"))}
    assert len(records) == 18
    assert records["first", "10"] == Record(
        "10", "first", "COMPLETED", 1795309440.0, 1795309445.0, 1795309450.0, 0, "cn[1-2]",
        {"cpu": 16, "node": 2, "billing": 68, "gres/gpu": 8, "gres/gpu:mi250": 8}, 5.0, reason="None",
    )  # fmt: skip
    assert records["exit3", "3"].exit_code == 3
    assert records["killed", "4"].exit_code == 128 + 9
    waiting = records["poor", "14"]
    assert (waiting.started, waiting.ended, waiting.nodes) == (None, None, "")
    assert waiting.reason == "AssocGrpGRESMinutes"
    assert records["odd|na,me", "17"].state == "PENDING"


def test_sacct_of_a_real_site() -> None:
    records = read_sacct(sample("sacct"))
    assert len(records) == 20
    resized = [r for r in records if r.name == "resized"]
    assert [(r.state, r.elapsed, r.tres["gres/gpu"]) for r in resized] == [
        ("RESIZING", 28, 8),
        ("COMPLETED", 42, 4),
    ]
    assert [r.energy_joules for r in resized] == [None, 35052]
    states = {r.name: r.state for r in records}
    assert states["cancelled"] == "CANCELLED", "without who it was"
    assert states["limit"] == "TIMEOUT"
    codes = {r.name: r.exit_code for r in records}
    assert (codes["exit3"], codes["killed"]) == (3, 137)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:00", 0), ("1:17", 77), ("2:03:04", 7384), ("2-03:04:05", 183845), ("", 0)]
)
def test_time_used(text: str, seconds: float) -> None:
    assert read_squeue(queued(TimeUsed=text))[0].elapsed == seconds


@pytest.mark.parametrize(
    ("text", "joules"),
    [
        ("3827", 3827.0),
        ("", None),
        ("0", None),  # no counters
        ("18446744073709551614", None),
        ("4294967294", None),
        ("1400000", 1400000.0),  # 20 kW for 10 s and a minute
        ("1400001", None),
        ("12.01K", None),
        ("-5", None),
    ],
)
def test_energy_that_cannot_be_is_none(text: str, joules: float | None) -> None:
    assert read_sacct(booked(ConsumedEnergyRaw=text))[0].energy_joules == joules


def test_what_a_resource_has_a_unit_is_not_counted() -> None:
    tres = read_sacct(booked(AllocTRES="billing=16,cpu=1,mem=8000M,fs/disk=1.5T,gres/gpu=2,x="))[0].tres
    assert tres == {"billing": 16, "cpu": 1, "gres/gpu": 2}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("slurm_load_jobs error: Unable to contact", "1 fields instead of 11"),
        (booked() + booked()[:40], "line 2 has"),
        (booked(State=""), "not a state"),
        (booked(State="12"), "not a state"),
        (booked(Submit="2026-11-22T00:40:00"), "not a number"),  # SLURM_TIME_FORMAT was not heeded
        (booked(ElapsedRaw="-1"), "not a number"),
        (booked(ElapsedRaw="1_0"), "not a number"),
        (booked(ExitCode="x"), "not a number"),
        (booked() + SEPARATOR, "line 2 has 2 fields"),
    ],
)
def test_what_cannot_be_read_is_an_error(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_sacct(text)


def test_no_job_at_all() -> None:
    assert read_sacct("") == read_squeue("\n\n") == []


def read_or_refused(text: str) -> list[Record]:
    """Nothing but ValueError may come of a text, and that with a line that one can show."""
    found = []
    for read in (read_squeue, read_sacct):
        try:
            found += read(text)
        except ValueError as error:
            told = str(error)
            assert told
            assert len(told) < 200
    return found


@given(st.text(st.characters() | st.sampled_from("\x1f\n|:0123456789")))
def test_any_text_is_read_or_refused(text: str) -> None:
    assert all(r.submitted >= 0 and r.elapsed >= 0 for r in read_or_refused(text))


CELL = st.sampled_from(
    [
        "",
        "0",
        "Unknown",
        "N/A",
        "None",
        "17",
        "COMPLETED",
        "CANCELLED by 5",
        "0:9",
        "a=1,b",
        "x" * 99,
        "٣",
        "²",
    ]
)


@given(st.lists(st.lists(CELL, min_size=11, max_size=11), max_size=5))
def test_any_fields_are_read_or_refused(rows: list[list[str]]) -> None:
    read_or_refused("\n".join(SEPARATOR.join(row) for row in rows))


NAMES = st.text(st.characters(exclude_characters="\n\x1f", exclude_categories=["Cs"]), min_size=1).map(
    str.strip
)


@given(NAMES, st.integers(0, 2**31), st.integers(0, 10**7), st.integers(1, 10**4), st.integers(0, 255))
def test_what_is_printed_is_what_is_read(
    name: str, submitted: int, elapsed: int, nodes: int, code: int
) -> None:
    row = booked(
        JobName=name,
        Submit=str(submitted),
        ElapsedRaw=str(elapsed),
        AllocTRES=f"node={nodes}",
        ExitCode=f"{code}:0",
    )
    (record,) = read_sacct(row)
    assert (record.name, record.submitted, record.elapsed) == (name, submitted, elapsed)
    assert (record.tres, record.exit_code) == ({"node": nodes}, code)
