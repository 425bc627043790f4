"""What Slurm allows, read from what a real 22.05 site printed, and from what others may print."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.slurm_limits import ASSOCIATION, JOBS, QOS, commands, is_full, read

PARTITIONS = """\
PartitionName=boost AllowGroups=ALL Default=YES QoS=N/A MaxNodes=UNLIMITED \
MaxTime=02:00:00 MinNodes=0 LLN=NO Nodes=cn[1-2] State=UP TotalCPUs=16 TotalNodes=2
PartitionName=low AllowGroups=ALL Default=NO QoS=brief MaxNodes=1 \
MaxTime=1-00:00:00 MinNodes=0 LLN=NO Nodes=cn[1-2] State=DRAIN TotalCPUs=16 TotalNodes=2
"""
RESERVATIONS = """\
ReservationName=maint StartTime=1795325620 EndTime=1795329220 Duration=01:00:00 Nodes=cn[1-2] NodeCnt=2 \
PartitionName=(null) Flags=MAINT,IGNORE_JOBS,SPEC_NODES,ALL_NODES Users=root State=INACTIVE
ReservationName=both StartTime=1795425620 EndTime=1795429220 Nodes=cn1,cn2,cn3 Flags=MAINT Users=root
ReservationName=part StartTime=1795336420 EndTime=1795340020 Duration=01:00:00 Nodes=cn1 NodeCnt=1 \
PartitionName=(null) Flags=MAINT,SPEC_NODES TRES=cpu=8 Users=root State=INACTIVE
ReservationName=course StartTime=1795336420 EndTime=1795340020 Nodes=cn[1-2] Flags=ALL_NODES Users=bob
"""
ASSOCIATIONS = "small||7||1-00:00:00|\nproj||5|9||\n"
POLICIES = "normal|2|||03:00:00|\nbrief|3|4|6|00:05:00|cpu=16,node=1\n"
QUEUE = "run.x.0000|proj|normal\nother|proj|normal\nthird|small|brief\n"
TOLD = {
    "partitions": PARTITIONS,
    "reservations": RESERVATIONS,
    "associations": ASSOCIATIONS,
    "qos": POLICIES,
    "jobs": QUEUE,
}
NOTHING: dict[str, Any] = {"closed": "", "times": [], "nodes": [], "jobs": [], "windows": []}


def test_of_the_default_partition_and_the_default_qos() -> None:
    assert read(TOLD, "", "", "", ["run.x.0000"]) == {
        "closed": "",
        "times": [(7200.0, "partition boost"), (86400.0, "account small"), (10800.0, "QOS normal")],
        "nodes": [],
        "jobs": [
            (7, 2, "account small (MaxSubmitJobs)"),
            (5, 2, "account proj (MaxSubmitJobs)"),
            (9, 2, "account proj (GrpSubmitJobs)"),
            (2, 1, "QOS normal (MaxSubmitPU)"),
        ],
        "windows": [
            {"start": 1795325620, "end": 1795329220, "name": "maint"},
            {"start": 1795425620, "end": 1795429220, "name": "both"},
        ],
    }


def test_of_another_partition_with_a_qos_of_its_own() -> None:
    found = read({**TOLD, "associations": "proj|low|1|||\nproj|boost|8|||\n"}, "proj", "low", "normal", [])
    assert found["closed"] == "partition low is DRAIN"
    assert found["times"] == [
        (86400.0, "partition low"),
        (10800.0, "QOS normal"),
        (300.0, "QOS brief"),
    ]
    assert found["nodes"] == [(1, "partition low"), (1, "QOS brief")]
    assert found["jobs"] == [
        (1, 2, "account proj (MaxSubmitJobs)"),
        (2, 2, "QOS normal (MaxSubmitPU)"),
        (3, 1, "QOS brief (MaxSubmitPU)"),
        (4, 0, "QOS brief (MaxSubmitPA)"),
        (6, 1, "QOS brief (GrpSubmit)"),
    ]


def test_an_associations_default_qos_is_used() -> None:
    told = {**TOLD, "associations": "proj|||||brief\n"}
    assert (300.0, "QOS brief") in read(told, "proj", "boost", "", [])["times"]


def test_who_does_not_answer_limits_nothing() -> None:
    assert read(dict.fromkeys(TOLD), "proj", "boost", "", []) == NOTHING
    assert read({}, "", "", "", []) == NOTHING


def test_no_reservations_is_a_sentence() -> None:
    assert read({**TOLD, "reservations": "No reservations in the system\n"}, "", "", "", [])["windows"] == []


@given(st.fixed_dictionaries({name: st.text("=|,[]-:1 aZ\n", max_size=60) for name in TOLD}))
def test_nothing_that_is_printed_breaks_the_reading(told: dict[str, str]) -> None:
    assert set(read(told, "a", "", "", [])) == set(NOTHING)


@given(
    st.sampled_from(sorted(TOLD)),
    st.integers(0, 700),
    st.sampled_from(["", "|", "=", "[", "9", "UNLIMITED", "-", " "]),
)
def test_nor_does_a_character_more_or_less(name: str, at: int, what: str) -> None:
    text = TOLD[name]
    assert set(read({**TOLD, name: text[:at] + what + text[at + 1 :]}, "proj", "boost", "", [])) == set(
        NOTHING
    )


def test_the_columns_that_are_asked_for_are_those_that_are_read() -> None:
    asked = commands("proj")
    assert f"format={','.join(ASSOCIATION)}" in asked["associations"]
    assert "account=proj" in asked["associations"]
    assert not any(word.startswith("account=") for word in commands("")["associations"])
    assert asked["qos"][-1] == f"format={','.join(QOS)}"
    assert asked["jobs"][-1] == "--Format=" + ":|,".join(JOBS) + ":"


@pytest.mark.parametrize(
    ("refusal", "full"),
    [
        ("QOSMaxSubmitJobPerUserLimit Batch job submission failed: Job violates accounting/QOS policy", True),
        ("AssocGrpSubmitJobsLimit Batch job submission failed: Job violates accounting/QOS policy", True),
        ("Slurm temporarily unable to accept job, sleeping and retrying", True),
        (
            "QOSMaxWallDurationPerJobLimit Batch job submission failed: Job violates accounting/QOS policy",
            False,
        ),
        ("Batch job submission failed: Invalid account or account/partition combination specified", False),
    ],
)
def test_a_full_queue_is_told_from_a_refusal(refusal: str, full: bool) -> None:
    assert is_full(refusal) == full
