"""A checkpoint goes from layout to layout: every bit arrives, and the training goes on as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoints.attempts import begin, commit
from checkpoints.reader import Reader, Shard
from checkpoints.store import write_shards
from clusters.segment import ModelShape, Segment
from parallelism.layout import Layout
from parallelism.megatron.optimizer import masters
from parallelism.megatron.trainer import Trainer
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import MODEL, TRAINING, contents, segment, trainer

pytestmark = pytest.mark.ranks

STEPS = 2  # in every layout
FOUR_GROUPS = replace(MODEL, query_groups=4)  # four tensor-parallel ranks need as many
TP2PP2 = Layout(tp=2, pp=2)
JOURNEY = [
    TP2PP2,
    Layout(tp=4),
    Layout(pp=4),
    Layout(dp=4, distributed_optimizer=True),
    Layout(pp=2, cp=2, vpp=2, distributed_optimizer=True),
    TP2PP2,
]


def hop(given: Segment, source: Path | None, arrived: Path, left: Path, first: int) -> dict[str, Any]:
    """Read `source`, write it as it arrived, train STEPS steps, write what came of it."""
    one = trainer(given)
    if source:
        reader = Reader(source)
        for shard in (*one.parameter_shards(), *one.state_shards()):
            shard.tensor.fill_(float("nan"))
            reader.read(shard)
        one.resume(first)
    steps = {float(master.state["step"]) for master in masters(one.optimizer)}
    write(one, arrived, first)
    results = [one.step(step) for step in range(first, first + STEPS)]
    write(one, left, first + STEPS)
    sums = torch.tensor([[r.loss_sum, r.tokens] for r in results], dtype=torch.float64)
    dist.all_reduce(sums)
    dist.destroy_process_group()
    return {"losses": (sums[:, 0] / sums[:, 1]).tolist(), "steps": steps}


def write(one: Trainer, attempt: Path, step: int) -> None:
    write_shards(attempt, dist.get_rank(), [*one.owned_parameter_shards(), *one.owned_state_shards()])
    dist.barrier()
    if dist.get_rank() == 0:
        commit(attempt, dist.get_world_size(), "checkpoint", {"step": step})


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All global tensors of a checkpoint; every element is in exactly one piece."""
    reader = Reader(checkpoint)
    shapes = {piece.name: piece.global_shape for piece in reader.manifest.pieces}
    tensors = {}
    for name, shape in shapes.items():
        held = sum(piece.box.size for piece in reader.manifest.pieces if piece.name == name)
        tensors[name] = torch.full(shape, float("nan"))
        reader.read(Shard(name, shape, (0,) * len(shape), tensors[name]))
        assert held == tensors[name].numel()
    return tensors


def assert_same_bits(one: Path, other: Path) -> None:
    ours, theirs = whole(one), whole(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.int32), theirs[name].view(torch.int32)), name


@pytest.mark.parametrize(
    ("precision", "model", "journey", "tolerance"),
    [
        ("fp32", FOUR_GROUPS, JOURNEY, 4e-6),
        # bf16 rounds what layouts add up in another order; what is kept are fp32 masters, bit for bit
        ("bf16", FOUR_GROUPS, [TP2PP2, Layout(dp=4, distributed_optimizer=True), TP2PP2], 0.02),
        # experts on two ranks, on four, on all together; copies of each on two ranks and on none
        (
            "fp32",
            replace(FOUR_GROUPS, experts=4),
            [
                Layout(dp=4, ep=2, distributed_optimizer=True),
                Layout(tp=2, pp=2, ep=2),
                Layout(dp=4, ep=4),
                Layout(pp=4),
            ],
            4e-6,
        ),
    ],
    ids=["fp32", "bf16", "experts"],
)
def test_there_and_back(
    ranks: Ranks,
    tmp_path: Path,
    precision: str,
    model: ModelShape,
    journey: list[Layout],
    tolerance: float,
) -> None:
    training = replace(TRAINING, steps=STEPS * len(journey), precision=precision)
    source: Path | None = None
    losses: list[float] = []
    for number, layout in enumerate(journey):
        given = segment(tmp_path, layout, model=model, training=training)
        arrived, left = (begin(tmp_path / "checkpoints", f"{name}-{number}") for name in ("arrived", "left"))
        results = ranks.run(4, partial(hop, given, source, arrived, left, STEPS * number))
        if source is not None:
            assert_same_bits(source, arrived)
        assert {step for result in results for step in result["steps"]} == {float(STEPS * number)}
        losses += results[0]["losses"]
        source = left
    unbroken = segment(tmp_path, Layout(), model=model, training=replace(training, precision="fp32"))
    (alone,) = ranks.run(1, partial(to_the_end, unbroken))
    assert losses == pytest.approx(alone, abs=tolerance)
    assert losses[-1] < losses[0] - 0.05


def to_the_end(given: Segment) -> list[float]:
    one = trainer(given)
    results = [one.step(step) for step in range(given.training.steps)]
    return [result.loss_sum / result.tokens for result in results]


def test_the_same_layout_writes_the_same_pieces(ranks: Ranks, tmp_path: Path) -> None:
    """Across three layouts and back without training, file by file."""
    source: Path | None = None
    made = []
    journey = [TP2PP2, Layout(dp=4, distributed_optimizer=True), TP2PP2]
    for number, layout in enumerate(journey):
        given = segment(tmp_path, layout, model=FOUR_GROUPS)
        arrived, left = (begin(tmp_path / "checkpoints", f"{name}-{number}") for name in ("arrived", "left"))
        ranks.run(4, partial(hop, given, source, arrived, left, 0))
        source = arrived
        made.append(arrived)
    assert contents(made[0]) == contents(made[2])
    assert contents(made[0]) != contents(made[1])
