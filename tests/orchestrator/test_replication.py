"""What an operator may name as the ends of a copy, how fast it may go, and what is said of it."""

from __future__ import annotations

import pytest

from checkpoints.replication.transfer import Outcome
from orchestrator.replication import facts, parse_rate, sentence


@pytest.mark.parametrize(("text", "rate"), [("100MB/s", 10**8), ("1 GiB/s", 2**30), ("2.5 kB / s", 2500)])
def test_a_rate_is_bytes_per_second(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["100MB", "100", "0MB/s", "MB/s", "100MB/h", "100Mbit/s", "-1MB/s", "", "1e999MB/s"]
)
def test_what_is_no_rate_is_told_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate such as") as caught:
        parse_rate(text)
    assert "\n" not in str(caught.value)


DONE = Outcome(
    "step-00000020.0001", 3 << 30, 96, where="/there/step-00000020.0001",
    sent=2 << 30, reused=1 << 30, carried=1 << 30, seconds=12.5,
)  # fmt: skip


def test_a_copy_is_told_in_a_sentence() -> None:
    assert sentence(DONE) == (
        "/there/step-00000020.0001: 3 GiB, verified; 1 GiB crossed in 12.5s, 1 GiB were there already"
    )
    again = Outcome("s", 3 << 30, 96, where="/there/s", already=True, reused=3 << 30)
    assert "is there already, and every byte of it is right" in sentence(again)


def test_json_keys_are_stable() -> None:
    assert list(facts(DONE)) == [
        "checkpoint", "path", "already", "bytes", "chunks", "sent", "reused", "carried", "repaired_chunks",
        "links_lost", "seconds",
    ]  # fmt: skip
