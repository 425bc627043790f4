"""The arithmetic of cuts: complete, disjoint, and megatron-core's own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.ranges import Box, intersect
from clusters.segment import ModelShape, Segment
from parallelism.cuts import cuts
from parallelism.layout import Layout
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import MODEL, TRAINING, segment, trainer

FOUR = replace(MODEL, query_groups=4)
EXPERTS = replace(FOUR, experts=4)
RICH = replace(FOUR, qk_norm=True, qkv_bias=True, tied_embeddings=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelShape, Layout]:
    model = draw(st.sampled_from([FOUR, RICH, EXPERTS, replace(FOUR, tied_embeddings=True)]))
    pp, vpp = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2)]))
    ep = draw(st.sampled_from([1, 2])) if model.experts else 1
    return model, Layout(
        tp=draw(st.sampled_from([1, 2, 4])) if not model.experts or ep > 1 else 1,
        pp=pp,
        vpp=vpp,
        dp=ep * draw(st.integers(1, 5)),
        ep=ep,
        cp=draw(st.sampled_from([1, 2])),
        distributed_optimizer=draw(st.booleans()),
    )


@given(cases())
def test_complete_and_disjoint(case: tuple[ModelShape, Layout]) -> None:
    model, layout = case
    boxes: dict[str, list[Box]] = defaultdict(list)
    shapes = {}
    for cut in cuts(model, layout):
        assert 0 <= cut.rank < layout.ranks
        assert cut.box.size
        boxes[cut.name].append(cut.box)
        shapes[cut.name] = cut.global_shape
    for name, shape in shapes.items():
        assert sum(box.size for box in boxes[name]) == prod(shape), name
        for number, box in enumerate(boxes[name]):
            assert not any(intersect(box, other) for other in boxes[name][number + 1 :]), name


def test_parameters_are_those_of_the_model() -> None:
    for model, layout in ((RICH, Layout(tp=2, pp=2)), (EXPERTS, Layout(dp=2, ep=2))):
        whole = replace(model, vocabulary_size=512)
        assert sum(cut.box.size for cut in cuts(whole, layout)) == whole.parameters


def written(given: Segment) -> list[tuple[int, str, tuple[int, ...], Box]]:
    one = trainer(given)
    return [(dist.get_rank(), s.name, tuple(s.global_shape), s.box) for s in one.owned_parameter_shards()]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(tp=2, pp=2), RICH),
        (Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True), RICH),
        (Layout(tp=2, cp=2, distributed_optimizer=True), FOUR),
        (Layout(dp=2, cp=2, distributed_optimizer=True), FOUR),
        (Layout(dp=3, distributed_optimizer=True), RICH),
        (Layout(dp=4, ep=2, distributed_optimizer=True), EXPERTS),
        (Layout(tp=2, dp=2, ep=2, distributed_optimizer=True), EXPERTS),
        (Layout(dp=2, pp=2, distributed_optimizer=True), EXPERTS),
        (Layout(tp=2, pp=2, ep=2), EXPERTS),
    ],
    ids=lambda value: str(value) if isinstance(value, Layout) else "model",
)
def test_megatron_cuts_alike(ranks: Ranks, tmp_path: Path, layout: Layout, model: ModelShape) -> None:
    given = segment(tmp_path, layout, model=model, training=replace(TRAINING, steps=1, global_batch=24))
    told = [cut for result in ranks.run(layout.ranks, partial(written, given)) for cut in result]
    assert sorted(told, key=str) == sorted(
        ((cut.rank, cut.name, cut.global_shape, cut.box) for cut in cuts(model, layout)), key=str
    )
