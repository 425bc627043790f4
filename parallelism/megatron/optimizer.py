"""AdamW, gradient clipping and the learning rate."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import (
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


def build_optimizer(
    training: Training, model: DistributedDataParallel, groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """megatron-core's optimizer around torch's fused AdamW, with all of Adam's state allocated.

    `get_megatron_optimizer` would take another Adam, with its step counter elsewhere, wherever Transformer
    Engine or apex happens to be installed. Norms get no weight decay, as Megatron has it.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.learning_rate,
        clip_grad=training.clip_grad or math.inf,  # 0 means no clipping; the norm is wanted all the same
        bf16=training.precision == "bf16",
        params_dtype=DTYPES[training.precision],
    )
    adam = torch.optim.AdamW(
        _parameter_groups(training, model),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=1e-8,
        fused=True,
    )
    if config.bf16:
        optimizer = Float16OptimizerWithFloat16Params(adam, config, None, _fill_state)
    else:
        optimizer = FP32Optimizer(adam, config, _fill_state)
    optimizer.grad_stats_parallel_group = groups.mp
    optimizer.tp_group = groups.tp
    _fill_state(adam)
    return optimizer


def _parameter_groups(training: Training, model: torch.nn.Module) -> list[dict[str, object]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
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
            adam.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
