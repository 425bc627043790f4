"""Every layout trains the same model: against one rank, in fp32."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoints.reader import Shard
from clusters.segment import ModelShape, Segment, Training
from parallelism.costs import stage_parameters
from parallelism.layout import Layout
from parallelism.megatron.optimizer import masters
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import MODEL, TRAINING, segment, trainer

pytestmark = pytest.mark.ranks

STEPS = 10
RUN = replace(TRAINING, steps=STEPS)
LAYOUTS = [
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=2),
    Layout(tp=2, pp=2),
    Layout(pp=2, dp=2),
    Layout(tp=2, dp=2),
    Layout(dp=2, distributed_optimizer=True),
    Layout(tp=2, dp=2, distributed_optimizer=True),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(tp=2, cp=2),
    Layout(dp=2, cp=2, distributed_optimizer=True),
]
Pieces = dict[tuple[str, tuple[int, ...]], torch.Tensor]


def train(given: Segment) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and this rank's weights before and after."""
    one = trainer(given)
    before = pieces(one.owned_parameter_shards())
    results = [one.step(step) for step in range(given.training.steps)]
    sums = torch.tensor([[r.loss_sum, r.tokens] for r in results], dtype=torch.float64)
    dist.all_reduce(sums)
    dist.destroy_process_group()
    return {
        "losses": sums[:, 0] / sums[:, 1],
        "tokens": sums[:, 1],
        "norms": [r.grad_norm for r in results],
        "rates": [r.learning_rate for r in results],
        "before": before,
        "after": pieces(one.owned_parameter_shards()),
        "state": pieces(one.owned_state_shards()),
        "held": sum(s.tensor.numel() for s in one.parameter_shards()),
        "steps": {float(master.state["step"]) for master in masters(one.optimizer)},
    }


def pieces(shards: list[Shard]) -> Pieces:
    return {(shard.name, shard.offset): shard.tensor.clone() for shard in shards}


def assembled(results: list[dict[str, Any]], kind: str) -> dict[str, torch.Tensor]:
    """Global tensors, put together from what the ranks own; every element must be owned exactly once."""
    whole: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
    for result in results:
        for (name, offset), tensor in result[kind].items():
            whole.setdefault(name, []).append((offset, tensor))
    tensors = {}
    for name, parts in whole.items():
        shape = [max(o[d] + t.shape[d] for o, t in parts) for d in range(len(parts[0][0]))]
        tensors[name], times = torch.zeros(shape), torch.zeros(shape)
        for offset, tensor in parts:
            box = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            tensors[name][box] = tensor
            times[box] += 1
        assert bool((times == 1).all()), f"{name} is not owned once everywhere"
    return tensors


def run(
    ranks: Ranks, scratch: Path, layout: Layout, training: Training = RUN, model: ModelShape = MODEL
) -> Any:
    given = segment(scratch, layout, training=training, model=model)
    return ranks.run(layout.ranks, partial(train, given))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_trains_as_one_rank(ranks: Ranks, tmp_path: Path, layout: Layout) -> None:
    alone, several = run(ranks, tmp_path, Layout()), run(ranks, tmp_path, layout)
    for result in several:
        assert (result["losses"] - alone[0]["losses"]).abs().max() <= 2e-6
        assert result["norms"] == pytest.approx(alone[0]["norms"], rel=1e-5)
        assert result["norms"] == several[0]["norms"]
        assert result["rates"] == alone[0]["rates"]
        assert result["tokens"].tolist() == [RUN.tokens_per_step] * STEPS
    assert alone[0]["losses"][-1] < alone[0]["losses"][0] - 0.1
    for kind, bound in (("before", 0.0), ("after", 1e-4), ("state", 1e-5)):
        ours, theirs = assembled(several, kind), assembled(alone, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).abs().max() <= bound, f"{kind}: {name}"


QWEN2 = replace(MODEL, qkv_bias=True, sliding_window=5)
QWEN3 = replace(MODEL, qk_norm=True, kv_channels=16, rope_scaling="llama3", rope_factor=4.0)


@pytest.mark.parametrize("model", [QWEN2, QWEN3], ids=["bias and window", "norm, width and stretched"])
def test_other_families_train_in_parallel_as_alone(ranks: Ranks, tmp_path: Path, model: ModelShape) -> None:
    alone, several = (run(ranks, tmp_path, layout, model=model) for layout in (Layout(), Layout(tp=2)))
    assert (several[0]["losses"] - alone[0]["losses"]).abs().max() <= 2e-6
    assert several[0]["norms"] == pytest.approx(alone[0]["norms"], rel=1e-5)
    assert all(result["held"] == stage_parameters(model, Layout(tp=2), 0) for result in several)
    assert assembled(several, "before").keys() == assembled(alone, "before").keys()


EXPERTS = replace(MODEL, experts=4, balance_loss=0.1)


@pytest.mark.parametrize(
    "layout",
    [
        *(Layout(dp=2, ep=2), Layout(dp=4, ep=2, distributed_optimizer=True)),
        *(Layout(pp=2, dp=2, ep=2), Layout(tp=2, dp=2, ep=2), Layout(cp=2, ep=2)),
    ],
    ids=str,
)
def test_a_layout_trains_experts_as_one_rank(ranks: Ranks, tmp_path: Path, layout: Layout) -> None:
    alone = run(ranks, tmp_path, Layout(), model=EXPERTS)
    several = run(ranks, tmp_path, layout, model=EXPERTS)
    assert (several[0]["losses"] - alone[0]["losses"]).abs().max() <= 2e-6
    assert several[0]["norms"] == pytest.approx(alone[0]["norms"], rel=1e-5)
    for kind, bound in (("before", 0.0), ("after", 1e-4), ("state", 1e-5)):
        ours, theirs = assembled(several, kind), assembled(alone, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).abs().max() <= bound, f"{kind}: {name}"


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2)], ids=str)
def test_the_layout_knows_what_a_rank_holds(ranks: Ranks, tmp_path: Path, layout: Layout) -> None:
    results = run(ranks, tmp_path, layout, replace(RUN, steps=1))
    for rank, result in enumerate(results):
        assert result["held"] == stage_parameters(MODEL, layout, layout.coordinates(rank).pp)


def test_tied_embeddings_across_a_pipeline(ranks: Ranks, tmp_path: Path) -> None:
    tied = replace(MODEL, tied_embeddings=True)
    alone, several = (run(ranks, tmp_path, layout, model=tied) for layout in (Layout(), Layout(pp=2)))
    assert (several[0]["losses"] - alone[0]["losses"]).abs().max() <= 2e-6
    assert assembled(several, "after").keys() == assembled(alone, "after").keys()
    assert not any("output_layer" in name for name in assembled(several, "after"))


def test_bf16_computes_roughly_the_same_on_fp32_masters(ranks: Ranks, tmp_path: Path) -> None:
    exact, rounded = (
        run(ranks, tmp_path, Layout()),
        run(ranks, tmp_path, Layout(pp=2), replace(RUN, precision="bf16")),
    )
    assert (rounded[0]["losses"] - exact[0]["losses"]).abs().max() < 0.02
    before, after = assembled(rounded, "before"), assembled(rounded, "after")
    for name, tensor in assembled(exact, "before").items():
        assert torch.equal(before[name], tensor), f"{name}: the master weights begin rounded"
        assert not torch.equal(after[name], after[name].bfloat16().float()), f"{name}: they are rounded later"


def test_no_clipping_still_tells_the_norm(ranks: Ranks, tmp_path: Path) -> None:
    free = run(ranks, tmp_path, Layout(), replace(RUN, clip_grad=0.0))
    tight = run(ranks, tmp_path, Layout(), replace(RUN, clip_grad=1e-4))
    assert free[0]["norms"][0] == pytest.approx(tight[0]["norms"][0])
    assert free[0]["norms"][0] > 0.1
    assert not torch.equal(free[0]["losses"], tight[0]["losses"])


def test_decay_spares_the_norms(ranks: Ranks, tmp_path: Path) -> None:
    """Without gradient to speak of, decay alone moves weights: by rate x decay of their size in each step."""
    quiet = replace(RUN, steps=1, learning_rate=0.0, warmup_steps=0)
    assert moved(run(ranks, tmp_path, Layout(), quiet)) == {"weights": 0.0, "norms": 0.0}
    decayed = replace(RUN, steps=1, learning_rate=1e-6, weight_decay=1e5, warmup_steps=0)
    movement = moved(run(ranks, tmp_path, Layout(), decayed))
    assert movement["weights"] == pytest.approx(0.1, rel=0.01)
    assert movement["norms"] < 1e-5


def moved(results: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative movement of a tensor, for matrices and for norms."""
    before, after = assembled(results, "before"), assembled(results, "after")
    relative = {name: float((after[name] - old).norm() / old.norm()) for name, old in before.items()}
    return {
        "weights": max(value for name, value in relative.items() if before[name].dim() == 2),
        "norms": max(value for name, value in relative.items() if before[name].dim() == 1),
    }


def interrupted(given: Segment, precision: str) -> bool:
    """Whether writing another's weights, moments and step into a trainer makes it go on as that one."""
    training = replace(given.training, precision=precision)
    one = trainer(replace(given, training=training))
    for step in range(3):
        one.step(step)
    saved = [shard.tensor.clone() for shard in (*one.parameter_shards(), *one.state_shards())]
    expected = [one.step(step) for step in range(3, 6)]
    for shard, tensor in zip((*one.parameter_shards(), *one.state_shards()), saved, strict=True):
        shard.tensor.copy_(tensor)
    one.resume(3)
    return [one.step(step) for step in range(3, 6)] == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_moments_and_step_are_all_the_state(ranks: Ranks, tmp_path: Path, precision: str) -> None:
    given = segment(tmp_path, Layout(tp=2), training=RUN)
    assert ranks.run(2, partial(interrupted, given, precision)) == [True, True]


def test_the_segment_names_its_layout(tmp_path: Path) -> None:
    assert Layout.from_mapping(segment(tmp_path, Layout(tp=2)).layout) == Layout(tp=2)
    assert asdict(Layout(tp=2)) == segment(tmp_path, Layout(tp=2)).layout
