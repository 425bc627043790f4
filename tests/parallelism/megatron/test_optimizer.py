"""The learning rate of every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallelism.megatron.optimizer import learning_rate
from tests.parallelism.samples import TRAINING

RUN = replace(TRAINING, steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)


def test_warm_up_and_cosine_at_known_points() -> None:
    assert learning_rate(RUN, 0) == pytest.approx(0.1)
    assert learning_rate(RUN, 4) == pytest.approx(0.5)
    assert learning_rate(RUN, 9) == learning_rate(RUN, 10) == 1.0
    assert learning_rate(RUN, 35) == pytest.approx(
        0.1 + 0.9 * 0.8535534
    )  # a quarter: (1 + cos 45 degrees) / 2
    assert learning_rate(RUN, 60) == pytest.approx(0.55)
    assert learning_rate(RUN, 110) == pytest.approx(0.1)
    assert learning_rate(RUN, 500) == pytest.approx(0.1)


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0.0, 1.0))
def test_up_then_down_and_never_outside(steps: int, warmup: int, final: float) -> None:
    run = replace(RUN, steps=steps, warmup_steps=warmup, final_learning_rate=final)
    rates = [learning_rate(run, step) for step in range(steps)]
    assert all(0 < rate <= 1.0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(rate >= final for rate in rates[warmup:])
