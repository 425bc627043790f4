"""What a rank holds of every tensor, under names and ranges that no layout changes.

megatron-core describes each parameter of a rank as boxes of global tensors: a column-parallel weight is one
box; the two halves of SwiGLU's first weight, which lie one below the other on every rank, are two. Adam's
moments and the fp32 master weights are cut like the parameter they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from checkpoints.reader import Shard


@dataclass(frozen=True)
class Placement:
    """Where one parameter of this rank lies in the global model."""

    parameter: torch.nn.Parameter
    entry: ShardedTensor | ShardedTensorFactory

    @property
    def owned(self) -> bool:
        """Whether this rank is the one among its replicas (data parallel, norms over tp) that writes."""
        return bool(is_main_replica(self.entry.replica_id))

    @property
    def master(self) -> torch.Tensor:
        """The fp32 weight the optimizer updates: under bf16 a copy of the parameter's."""
        return getattr(self.parameter, "main_param", self.parameter)

    def shards(self, tensor: torch.Tensor, prefix: str = "") -> list[Shard]:
        """Views of `tensor`, which has the parameter's shape, as boxes of global tensors."""
        tensor = tensor.detach()
        if isinstance(self.entry, ShardedTensorFactory):
            parts: list[ShardedTensor] = list(replace(self.entry, data=tensor).build())
        else:
            parts = [replace(self.entry, data=tensor, dtype=tensor.dtype)]
        return [Shard(prefix + part.key, part.global_shape, part.global_offset, part.data) for part in parts]


def placements(model: GPTModel, groups: ProcessGroupCollection) -> list[Placement]:
    """One for each trainable parameter of this rank's model, in the order of their names."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.dp_cp}  # a name for every layer
    described = dict(sorted(model.sharded_state_dict(metadata=metadata).items()))
    entries = {id(e.data): e for e in _tensors(described) if isinstance(e.data, torch.nn.Parameter)}
    parameters = {id(p) for p in model.parameters() if p.requires_grad}
    assert parameters == set(entries), "a trainable parameter has no place, or a place no parameter"
    return [Placement(entry.data, entry) for entry in entries.values()]


def _tensors(described: dict[str, object]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for entry in described.values():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            yield entry
