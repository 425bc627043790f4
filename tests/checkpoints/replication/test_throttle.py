"""The limit holds over any stretch of time, whoever asks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from checkpoints.replication.throttle import SLICE, Bucket


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@given(
    st.floats(1e3, 1e10),
    st.lists(st.tuples(st.integers(1, SLICE), st.floats(0, 2)), min_size=1, max_size=60),
)
def test_no_stretch_of_time_carries_more_than_the_rate_and_one_bucket(
    rate: float, asked: list[tuple[int, float]]
) -> None:
    clock = Clock()
    bucket = Bucket(rate, clock, clock.sleep)
    gone: list[tuple[float, int]] = []
    for size, idle in asked:
        clock.sleep(idle)
        bucket(size)
        gone.append((clock.now, size))
    room = max(rate / 10, SLICE)
    for first in range(len(gone)):
        carried = sum(size for _, size in gone[first:])
        # the first of them may have been let through at the moment that it came
        assert carried - gone[first][1] <= (clock.now - gone[first][0]) * rate + room + 1e-3 * rate


def test_a_steady_stream_has_the_whole_rate() -> None:
    clock = Clock()
    bucket = Bucket(1e6, clock, clock.sleep)
    for _ in range(1000):
        bucket(10_000)
    assert 9.5 <= clock.now <= 10.0  # 10 MB at 1 MB/s, less what the bucket held
