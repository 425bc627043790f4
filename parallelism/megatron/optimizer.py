"""AdamW, gradient clipping and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from clusters.segment import Training
from parallelism.megatron.model import DTYPES


def learning_rate(training: Training, step: int) -> float:
    """For the step after `step` completed ones: linear warm-up, then a cosine down to the final rate."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    span = training.learning_rate - training.final_learning_rate
    return training.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Master:
    """The fp32 values of a parameter that this rank's optimizer changes, and Adam's state of them.

    All of the parameter, or under the distributed optimizer its elements from `start` on, in row-major order:
    as many as fell into this rank's equal share of the gradient buffer.
    """

    parameter: torch.nn.Parameter
    values: torch.Tensor
    start: int
    is_share: bool  # no other data-parallel rank has these elements
    state: dict[str, torch.Tensor]  # step, exp_avg, exp_avg_sq


def build_optimizer(
    training: Training, chunks: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> ChainedOptimizer:
    """megatron-core's optimizers around torch's fused AdamW, with all of Adam's state allocated.

    `get_megatron_optimizer` would take another Adam, with its step counter elsewhere, wherever Transformer
    Engine or apex happens to be installed. Norms get no weight decay, as Megatron has it.
    """
    distributed = bool(chunks[0].ddp_config.use_distributed_optimizer)
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.learning_rate,
        clip_grad=training.clip_grad or math.inf,  # 0 means no clipping; the norm is wanted all the same
        bf16=training.precision == "bf16",
        params_dtype=DTYPES[training.precision],
        use_distributed_optimizer=distributed,
    )
    trainable = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    dense = [p for p in trainable if getattr(p, "allreduce", True)]
    experts = [p for p in trainable if not getattr(p, "allreduce", True)]  # their own data-parallel ranks
    buffers = {number: chunk.buffers for number, chunk in enumerate(chunks)}
    parts = [_part(training, config, dense, chunks, buffers, groups.intra_dp_cp, groups.mp, groups)]
    if experts:
        buffers = {number: chunk.expert_parallel_buffers for number, chunk in enumerate(chunks)}
        shares, model_parallel = groups.intra_expt_dp, groups.tp_ep_pp
        parts.append(_part(training, config, experts, chunks, buffers, shares, model_parallel, groups))
    return ChainedOptimizer(parts)


def _part(
    training: Training,
    config: OptimizerConfig,
    trainable: list[torch.nn.Parameter],
    chunks: list[DistributedDataParallel],
    buffers: dict[int, Any],
    shares: dist.ProcessGroup,
    model_parallel: dist.ProcessGroup,
    groups: ProcessGroupCollection,
) -> MegatronOptimizer:
    """`shares`: the ranks among which the distributed optimizer cuts; `model_parallel`: those that together
    hold all gradients once where nothing is cut."""
    distributed = config.use_distributed_optimizer
    adam = torch.optim.AdamW(
        _parameter_groups(training, trainable),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=1e-8,
        fused=True,
    )
    if distributed:
        optimizer = _distributed(adam, config, chunks, buffers, shares)
    elif config.bf16:
        optimizer = Float16OptimizerWithFloat16Params(adam, config, None, _fill_state)
    else:
        optimizer = FP32Optimizer(adam, config, _fill_state)
    optimizer.grad_stats_parallel_group = groups.intra_dist_opt if distributed else model_parallel
    optimizer.tp_group = groups.tp
    _fill_state(adam)
    return optimizer


def _distributed(
    adam: torch.optim.Optimizer,
    config: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    buffers: dict[int, Any],
    shares: dist.ProcessGroup,
) -> DistributedOptimizer:
    return DistributedOptimizer(
        adam,
        config,
        None,  # no loss scale: bf16 needs none
        _fill_state,
        model_chunks=chunks,
        per_model_buffers=buffers,
        data_parallel_group=shares,
        data_parallel_group_gloo=None,  # of megatron-core's own checkpoints
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )


def masters(optimizer: ChainedOptimizer) -> list[Master]:
    """What this rank's optimizers change."""
    return [
        Master(parameter, values, _start(part, parameter), _shares(part), part.state[values])
        for part in optimizer.chained_optimizers
        for parameter, values in _pairs(part)
    ]


def _pairs(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Every parameter with the values that the optimizer changes in its stead: itself in fp32."""
    if isinstance(optimizer, DistributedOptimizer):
        kinds = [
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        ]
    elif isinstance(optimizer, FP32Optimizer):
        own = [group["params"] for group in optimizer.param_groups]
        kinds = [(own, own)]
    else:
        assert not any(optimizer.fp32_from_fp32_groups)
        kinds = [(optimizer.float16_groups, optimizer.fp32_from_float16_groups)]
    for parameters, values in kinds:
        yield from zip(chain(*parameters), chain(*values), strict=True)


def _shares(optimizer: MegatronOptimizer) -> bool:
    return isinstance(optimizer, DistributedOptimizer)


def _start(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> int:
    if not _shares(optimizer):
        return 0
    return int(optimizer._get_model_param_range_map(parameter)["param"].start)


def publish(optimizer: ChainedOptimizer) -> None:
    """Make the model compute with the master values as they are now: under bf16 rounded, and under the
    distributed optimizer gathered from all ranks that hold a share. Called by all ranks."""
    with torch.no_grad():
        for part in optimizer.chained_optimizers:
            if isinstance(part, FP32Optimizer):
                continue  # its values are the model's
            part._copy_main_params_to_model_params()
        for chunk in optimizer.model_chunks:  # the distributed optimizer's; the others know none
            chunk.start_param_sync(force_sync=True)


def _parameter_groups(training: Training, trainable: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    weights = [p for p in trainable if p.dim() > 1]
    norms = [p for p in trainable if p.dim() == 1]
    groups: list[dict[str, object]] = [{"params": weights, "weight_decay": training.weight_decay}]
    if norms:
        groups.append({"params": norms, "weight_decay": 0.0})
    return groups


def _fill_state(adam: torch.optim.Optimizer, *_: object) -> None:
    """What AdamW would allocate in its first step: a checkpoint is read into it before."""
    for group in adam.param_groups:
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            zeros = (torch.zeros_like(p, requires_grad=False) for _ in range(2))
            adam.state[p] = {"step": step, **dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))}
