"""Initial weights: positions, not layouts, decide."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.reader import Shard
from parallelism.megatron import initial
from parallelism.megatron.initial import fill, random_values

SHAPE = (50, 36)
NAME = "decoder.layers.0.mlp.linear_fc1.weight"


def filled(offset: tuple[int, ...], shape: tuple[int, ...], name: str = NAME, seed: int = 1) -> torch.Tensor:
    shard = Shard(name, SHAPE if len(shape) == 2 else (100,), offset, torch.empty(shape))
    fill(shard, seed, layers=8)
    return shard.tensor


@settings(deadline=None)
@given(st.integers(0, 1 << 40), st.integers(0, 100), st.integers(0, 100))
def test_a_position_has_one_value(start: int, before: int, count: int) -> None:
    whole = random_values(3, "w", start, before + count)
    np.testing.assert_array_equal(random_values(3, "w", start + before, count), whole[before:])


@given(st.data())
def test_a_shard_is_its_part_of_the_whole(data: st.DataObject) -> None:
    rows = sorted(data.draw(st.lists(st.integers(0, SHAPE[0]), min_size=2, max_size=2)))
    columns = sorted(data.draw(st.lists(st.integers(0, SHAPE[1]), min_size=2, max_size=2)))
    part = filled((rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0]))
    whole = filled((0, 0), SHAPE)
    assert torch.equal(part, whole[slice(*rows), slice(*columns)])


def test_large_tensors_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled((0, 0), SHAPE)
    monkeypatch.setattr(initial, "_CHUNK", 100)  # two rows at a time, of 36 values
    assert torch.equal(filled((0, 0), SHAPE), whole)


def test_nearly_normal() -> None:
    values = random_values(1, "w", 0, 400_000)
    assert abs(values.mean()) < 0.005
    assert values.std() == pytest.approx(1.0, abs=0.005)
    assert (values**4).mean() == pytest.approx(3 - 0.3, abs=0.03)
    assert 3.2 < abs(values).max() < 3.47


def test_deviations_and_norms() -> None:
    assert filled((0, 0), SHAPE).std() == pytest.approx(0.02, rel=0.05)
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        assert filled((0, 0), SHAPE, name).std() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 x 8 layers)
    assert torch.equal(filled((0,), (100,)), torch.ones(100))
    assert torch.equal(filled((0,), (100,), "self_attention.linear_qkv.bias"), torch.zeros(100))


def test_names_and_seeds_differ() -> None:
    tensors = [filled((0, 0), SHAPE), filled((0, 0), SHAPE, "other.weight"), filled((0, 0), SHAPE, seed=2)]
    correlations = np.corrcoef([tensor.flatten().numpy() for tensor in tensors])
    assert np.abs(correlations - np.eye(3)).max() < 0.1


def test_the_same_on_every_machine_and_for_ever() -> None:
    """Another digest would mean that islands begin differently, or that old runs cannot be repeated."""
    digest = hashlib.sha256(filled((0, 0), SHAPE).numpy().tobytes()).hexdigest()
    assert digest[:16] == "17420518a3791fb8"
