"""The WAN's arithmetic: when a packet arrives."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.testbed.wan import Link, Shaper

PACKETS = st.lists(st.tuples(st.floats(0, 1), st.integers(20, 1500)), min_size=1, max_size=50)


@given(PACKETS, st.floats(0, 200), st.floats(0.1, 1000))
def test_packets_keep_their_order_and_the_rate(
    packets: list[tuple[float, int]], delay: float, rate: float
) -> None:
    shaper = Shaper(Link(delay, rate, queue_ms=1e9))
    times = sorted(packets)
    arrivals = [shaper.arrival(now, "a", "b", size) for now, size in times]
    assert None not in arrivals
    assert arrivals == sorted(arrivals, key=float)  # type: ignore[arg-type]
    seconds = sum(size for _, size in times) * 8e-6 / rate
    assert arrivals[-1] is not None
    assert arrivals[-1] >= times[0][0] + seconds + delay / 1e3 - 1e-6


def test_what_would_wait_longer_than_the_queue_is_dropped() -> None:
    shaper = Shaper(Link(delay_ms=0, rate_mbit=8, queue_ms=10.5))  # a byte per microsecond
    got = [shaper.arrival(0.0, "a", "b", 1000) for _ in range(20)]
    assert [g is not None for g in got] == [True] * 11 + [False] * 9


def test_a_cut_is_of_one_direction_and_loss_is_a_share() -> None:
    shaper = Shaper(random=random.Random(1))
    shaper.configure({"default": {"loss": 0.25}, "links": {"a>b": {"down": True}}})
    assert shaper.arrival(0.0, "a", "b", 100) is None
    lost = [shaper.arrival(float(n), "b", "a", 100) is None for n in range(1000)]
    assert 200 < sum(lost) < 300


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="latency"):
        Shaper().configure({"default": {"latency": 3}, "links": {}})
