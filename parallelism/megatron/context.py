"""Context parallelism: a sequence shared among ranks, each with the queries of its own positions.

A sequence is cut into 2 cp chunks; rank r holds chunks r and 2 cp - 1 - r, one cheap and one dear under a
causal mask, as megatron-core's rotary positions expect. Keys and values are gathered from all ranks (Llama 3:
arXiv 2407.21783, section 3.3.2): with grouped queries they are small beside the activations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def positions(length: int, ranks: int, rank: int) -> torch.Tensor:
    """int64 [length / ranks]: which positions of the sequence a rank holds, in their order there."""
    chunks = torch.arange(length).view(2 * ranks, -1) if ranks > 1 else torch.arange(length).view(1, -1)
    return chunks[[rank, 2 * ranks - 1 - rank]].flatten() if ranks > 1 else chunks.flatten()


def gather_sequence(x_SBGD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What all ranks of `group` hold, along the first dimension in the order of the sequence."""
    gathered: torch.Tensor = _Gather.apply(x_SBGD, group)  # type: ignore[no-untyped-call]
    ranks, length = group.size(), gathered.shape[0]
    there = torch.cat([positions(length, ranks, rank) for rank in range(ranks)])
    return gathered[torch.argsort(there).to(gathered.device)]


class _Gather(torch.autograd.Function):
    """[S, ...] of every rank -> [ranks x S, ...]; backward, each rank's part of the sum of gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.group)  # gloo has no reduce-scatter of its own for lists
        return total.chunk(ctx.group.size())[ctx.group.rank()], None
