"""Who holds which positions of a sequence, and the sequence put together again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from parallelism import device
from parallelism.megatron.context import gather_sequence, positions
from tests.parallelism.forked import Ranks


@given(st.integers(1, 6), st.integers(1, 5))
def test_every_position_is_held_once_and_the_work_is_even(ranks: int, chunk: int) -> None:
    length = 2 * ranks * chunk
    held = [positions(length, ranks, rank) for rank in range(ranks)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    seen = {int((part + 1).sum()) for part in held}  # keys before each query: what attention costs
    assert len(seen) == 1


def test_chunks_as_megatron_has_them() -> None:
    assert positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert positions(3, 1, 0).tolist() == [0, 1, 2]


def gathered() -> tuple[list[float], list[float]]:
    device.join(device.pick(), 2)
    rank = dist.get_rank()
    mine = positions(8, 2, rank).float().requires_grad_()
    whole = gather_sequence(mine, dist.group.WORLD)  # type: ignore[arg-type]
    (whole * torch.arange(8) * (rank + 1)).sum().backward()
    assert mine.grad is not None
    return whole.tolist(), mine.grad.tolist()


@pytest.mark.ranks
def test_gathered_in_order_with_gradients_of_all_ranks(ranks: Ranks) -> None:
    results = ranks.run(2, gathered)
    for rank, (whole, gradient) in enumerate(results):
        assert whole == list(range(8))
        assert gradient == [3.0 * p for p in positions(8, 2, rank).tolist()]
