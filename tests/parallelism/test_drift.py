"""The sketch of a base: the same for every layout, and near the truth about how far two bases differ."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.ranges import Box
from checkpoints.reader import Shard
from parallelism.drift import PROJECTIONS, added, sketch
from tests.checkpoints.test_quantised import cuttings, shapes


def whole(tensor: torch.Tensor, name: str = "w") -> Shard:
    return Shard(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def estimate(a: torch.Tensor, b: torch.Tensor, name: str = "w") -> float:
    first, second = (sketch([whole(t, name)])[name] for t in (a, b))
    pairs = zip(first[:PROJECTIONS], second[:PROJECTIONS], strict=True)
    return math.sqrt(sum((x - y) ** 2 for x, y in pairs) / PROJECTIONS)


@settings(max_examples=60, deadline=None)
@given(st.data(), shapes)
def test_every_layout_has_the_same_sketch(data: st.DataObject, shape: tuple[int, ...]) -> None:
    tensor, origin = normal(shape), Box((0,) * len(shape), shape)
    boxes = data.draw(cuttings(shape))
    parts = [Shard("w", shape, box.offset, tensor[box.slices(origin)]) for box in boxes]
    together = added([sketch(parts[::2]), sketch(parts[1::2])])
    assert together["w"] == pytest.approx(sketch([whole(tensor)])["w"], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shape", [(), (1000,), (40, 300), (4, 30, 50)])
def test_the_last_number_is_the_sum_of_squares(shape: tuple[int, ...]) -> None:
    tensor = normal(shape)
    numbers = sketch([whole(tensor)])["w"]
    assert len(numbers) == PROJECTIONS + 1
    assert numbers[-1] == pytest.approx(float(tensor.double().square().sum()))


@pytest.mark.parametrize("shape", [(1000,), (40, 300), (4, 30, 50)])
def test_projections_tell_how_far_two_tensors_differ(shape: tuple[int, ...]) -> None:
    base = normal(shape)
    ratios = []
    for seed in range(1, 61):
        change = 1e-6 * normal(shape, seed)
        ratios.append(estimate(base, base + change, f"w{seed}") / float(((base + change) - base).norm()))
    assert 0.8 < sum(r * r for r in ratios) / len(ratios) < 1.25  # unbiased
    within = sum(0.5 < r < 2.0 for r in ratios) / len(ratios)
    assert within >= 0.9


def test_one_changed_element_is_seen_wherever_it_is() -> None:
    base = normal((50, 70))
    for position in (0, 69, 1234, 3499):
        other = base.clone()
        other.view(-1)[position] += 0.25
        assert estimate(base, other) == pytest.approx(0.25, rel=1e-6)


def test_bases_that_are_equal_have_no_distance() -> None:
    assert estimate(normal((50, 70)), normal((50, 70))) == 0.0


def test_tensors_of_one_shape_are_projected_onto_different_signs() -> None:
    tensor = normal((30, 30))
    found = sketch([whole(tensor, "v"), whole(tensor, "w")])
    assert found["v"][:-1] != found["w"][:-1]
    assert found["v"][-1] == found["w"][-1]


def test_large_tensors_are_projected_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = normal((37, 11))
    at_once = sketch([whole(tensor)])["w"]
    monkeypatch.setattr("parallelism.drift._CHUNK", 50)
    assert sketch([whole(tensor)])["w"] == pytest.approx(at_once, rel=1e-12)
