"""One rank's part in the training of one island: the step, and all state it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from checkpoints.reader import Shard
from clusters.segment import Segment
from parallelism.device import Device
from parallelism.layout import Layout
from parallelism.megatron import cpu, moe
from parallelism.megatron.context import positions
from parallelism.megatron.groups import form_groups
from parallelism.megatron.initial import fill
from parallelism.megatron.model import build_model, transformer_config
from parallelism.megatron.noise import hush
from parallelism.megatron.optimizer import build_optimizer, learning_rate, masters, publish
from parallelism.megatron.shards import Placement, placements


class Batches(Protocol):
    """Where the tokens come from (parallelism/data.py)."""

    def micro_batches(self, step: int) -> list[torch.Tensor]:
        """This rank's micro-batches of the step after `step` completed ones, each int64 [B, S + 1]."""


@dataclass(frozen=True)
class StepResult:
    """Loss and tokens are this rank's share: their sums over all ranks are the island's."""

    loss_sum: float  # of the tokens' cross entropies, in nats
    tokens: int
    grad_norm: float  # of the whole model, before clipping; equal on all ranks
    learning_rate: float


class Trainer:
    """The model, its gradients and its optimizer on this rank. The default process group must exist."""

    def __init__(self, segment: Segment, layout: Layout, device: Device, batches: Batches) -> None:
        hush()
        moe.without_transformer_engine()
        if device.is_cpu:
            cpu.patch()
        self.training = segment.training
        self.device = device
        self.batches = batches
        self.groups = form_groups(layout, segment.training.seed)
        self._micro_batches = layout.micro_batches(segment.training)
        config = transformer_config(segment.model, segment.training, layout)
        config.finalize_model_grads_func = finalize_model_grads
        self._pipeline = P2PCommunicator(self.groups.pp, config)
        self.chunks = build_model(config, segment.model, segment.training, self.groups, layout)
        self.optimizer = build_optimizer(segment.training, self.chunks, self.groups)
        self._placements = placements([*map(_bare, self.chunks)], masters(self.optimizer), self.groups)
        for shard in self.parameter_shards():
            fill(shard, segment.training.seed, segment.model.layers)
        self.reload()

    def step(self, step: int) -> StepResult:
        """Train on the next global batch, `step` steps having been completed."""
        rate = learning_rate(self.training, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()  # or the first micro-batch would be added twice
        micro_batches = self._on_device(step)
        feeds = [iter(micro_batches) for _ in self.chunks]  # every virtual stage counts them for itself
        interleaved = len(self.chunks) > 1
        reports = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=feeds if interleaved else feeds[0],
            model=self.chunks if interleaved else self.chunks[0],
            num_microbatches=self._micro_batches,
            seq_length=self.training.sequence_length,
            micro_batch_size=self.training.micro_batch,
            forward_only=False,
            p2p_communicator=self._pipeline,
            pg_collection=self.groups,
        )
        _, norm, _ = self.optimizer.step()
        # the last stage alone has reports, and its tensor-parallel ranks all have the same
        counted = reports if self.groups.tp.rank() == 0 else []
        loss = sum(float(report["loss"]) for report in counted)
        return StepResult(loss, sum(report["tokens"] for report in counted), float(norm), rate)

    def parameter_shards(self) -> list[Shard]:
        """The fp32 weights this rank holds; after writing to them, call `reload`."""
        return [shard for place in self._placements for shard in place.shards(place.master.values)]

    def owned_parameter_shards(self) -> list[Shard]:
        """Those which this rank, and no other, has to write."""
        return [s for place in self._placements if place.owned for s in place.shards(place.master.values)]

    def state_shards(self) -> list[Shard]:
        """Adam's moments. Its step count is the number of steps completed: see `resume`."""
        return [shard for place in self._placements for shard in self._moments(place)]

    def owned_state_shards(self) -> list[Shard]:
        return [s for place in self._placements if place.owned for s in self._moments(place)]

    def reload(self) -> None:
        """Make the model compute with the weights as they are now. Called by all ranks."""
        publish(self.optimizer)

    def resume(self, step: int) -> None:
        """Go on after `step` completed steps, weights and moments having been read. Called by all ranks."""
        for place in self._placements:
            place.master.state["step"].fill_(step)
        self.reload()

    def _moments(self, place: Placement) -> Iterator[Shard]:
        for name in ("exp_avg", "exp_avg_sq"):
            yield from place.shards(place.master.state[name], f"optimizer.{name}.")

    def _on_device(self, step: int) -> list[torch.Tensor]:
        """Each int64 [2, B, S]: this rank's positions of the sequences, and what follows them."""
        held = positions(self.training.sequence_length, self.groups.cp.size(), self.groups.cp.rank())
        return [
            torch.stack([tokens[:, held], tokens[:, held + 1]]).to(self.device.torch, non_blocking=True)
            for tokens in self.batches.micro_batches(step)
        ]


def _forward(batches: Iterator[torch.Tensor], model: DistributedDataParallel) -> Any:
    tokens, following = next(batches)
    return model(tokens, None, None, labels=following), partial(_loss, following.numel())


def _loss(count: int, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """megatron-core divides the gradients by the step's tokens, summed over micro-batches and ranks."""
    total = losses.float().sum()
    tokens = torch.tensor(count, dtype=torch.int, device=total.device)
    return total, tokens, {"loss": total.detach(), "tokens": count}


def _bare(model: Any) -> GPTModel:
    """What is inside the wrappers for gradients and precision."""
    while hasattr(model, "module"):
        model = model.module
    return model
