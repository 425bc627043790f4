"""Contributions of real ranks: shares of the distributed optimizer and experts give what one rank gives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoints.attempts import begin, commit
from checkpoints.quantised import CutMaxima
from checkpoints.store import write_shards
from clusters.segment import Rounds, Segment
from parallelism.drift import Sketch, added
from parallelism.layout import Layout
from parallelism.outer import Outer
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import MODEL, segment, trainer
from tests.parallelism.test_journey import whole

pytestmark = pytest.mark.ranks

EXPERTS = replace(MODEL, experts=4)


def contribute(given: Segment, attempt: Path, quantise: str) -> Sketch:
    """A difference that no layout changes: of a model whose weights have grown by half."""
    one = trainer(given)
    rounds = Rounds(inner_steps=1, quantise=quantise)
    outer = Outer(one.parameter_shards(), one.owned_parameter_shards(), rounds, "run", "a")
    for shard in one.parameter_shards():
        shard.tensor.mul_(1.5)
    told: list[tuple[list[CutMaxima], Sketch]] = [([], {})] * dist.get_world_size()
    dist.all_gather_object(told, (outer.cuts(), outer.sketch()))
    cuts = [cut for ours, _ in told for cut in ours]
    write_shards(attempt, dist.get_rank(), outer.contribution(cuts))
    dist.barrier()
    if dist.get_rank() == 0:
        commit(attempt, dist.get_world_size(), "checkpoint", {"step": 1})
    return added(sketch for _, sketch in told)


@pytest.mark.parametrize("quantise", ["none", "int8"])
def test_all_layouts_contribute_the_same(ranks: Ranks, tmp_path: Path, quantise: str) -> None:
    found: list[dict[str, torch.Tensor]] = []
    sketches: list[Sketch] = []
    for layout in (Layout(), Layout(dp=4, ep=2, distributed_optimizer=True)):
        given = segment(tmp_path, layout, model=EXPERTS)
        attempt = begin(tmp_path / "updates", "update")
        sketches.append(ranks.run(layout.ranks, partial(contribute, given, attempt, quantise))[0])
        found.append(whole(attempt))
    alone, shared = found
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, shared[name]), name
    for name, values in sketches[0].items():
        assert sketches[1][name] == pytest.approx(values, rel=1e-9, abs=1e-9)
