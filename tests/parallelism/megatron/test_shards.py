"""A rank's part of a parameter, cut anywhere, becomes boxes that cover it once."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.reader import Shard
from parallelism.megatron.optimizer import Master
from parallelism.megatron.shards import Part, Placement

sizes = st.integers(1, 7)


@st.composite
def cut_parameters(draw: st.DrawFn) -> tuple[torch.Tensor, list[Placement], list[Part]]:
    """A parameter of one or two parts (SwiGLU's halves), one below the other, and its shares among ranks."""
    rows, columns, halves = draw(sizes), draw(sizes), draw(st.integers(1, 2))
    flat_shape = draw(st.booleans())
    shape = (rows,) if flat_shape else (rows, columns)
    size = torch.Size(shape).numel()
    whole = torch.arange(halves * size, dtype=torch.float32)
    # a part lies `half` tensors of its size further down in a global tensor of 2 x halves of them
    parts = [
        Part(
            "w",
            (2 * halves * rows, *shape[1:]),
            (2 * half * rows, *(0 for _ in shape[1:])),
            shape,
            half * size,
        )
        for half in range(halves)
    ]
    cuts = sorted(draw(st.lists(st.integers(0, halves * size), max_size=4)))
    placements = [
        Placement(Master(torch.nn.Parameter(whole), whole[a:b], a, True, {}), tuple(parts), True)
        for a, b in pairwise([0, *cuts, halves * size])
        if a < b
    ]
    return whole, placements, parts


def written(shards: list[Shard], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the shards put into the global tensor, and how often each element is written."""
    values, times = torch.full(shape, -1.0), torch.zeros(shape)
    for shard in shards:
        box = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
        values[box] = shard.tensor
        times[box] += 1
    return values, times


@given(cut_parameters())
def test_shares_are_complete_and_disjoint(
    cut: tuple[torch.Tensor, list[Placement], list[Part]],
) -> None:
    whole, placements, parts = cut
    shards = [s for place in placements for s in place.shards(place.master.values)]
    values, times = written(shards, parts[0].global_shape)
    assert all(shard.tensor.numel() for shard in shards)
    assert times.max() == 1
    assert times.sum() == whole.numel()
    for part in parts:
        rows = slice(part.offset[0], part.offset[0] + part.shape[0])
        expected = whole[part.start : part.start + part.size].view(part.shape)
        assert torch.equal(values[rows], expected)


@given(cut_parameters())
def test_shards_are_views(cut: tuple[torch.Tensor, list[Placement], list[Part]]) -> None:
    whole, placements, _ = cut
    for place in placements:
        for shard in place.shards(place.master.values, "moment."):
            assert shard.name == "moment.w"
            shard.tensor.fill_(-7.0)
    assert bool((whole == -7.0).all())


@given(cut_parameters())
def test_a_share_takes_few_boxes(cut: tuple[torch.Tensor, list[Placement], list[Part]]) -> None:
    """Three for each part it meets: the rest of a row, whole rows, the beginning of one."""
    _, placements, parts = cut
    for place in placements:
        assert len(place.shards(place.master.values)) <= 3 * len(parts)
