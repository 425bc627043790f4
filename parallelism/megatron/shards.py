"""What a rank holds of every tensor, under names and ranges that no layout changes.

megatron-core describes each parameter of a rank as boxes of global tensors: a column-parallel weight is one
box; the two halves of SwiGLU's first weight, which lie one below the other on every rank, are two. Adam's
moments and the fp32 master weights are cut like the parameter they belong to; a share of the distributed
optimizer, which begins and ends anywhere in it, becomes a few boxes more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from checkpoints.ranges import Shape, runs
from checkpoints.reader import Shard
from parallelism.megatron.optimizer import Master


@dataclass(frozen=True)
class Part:
    """Consecutive elements of a rank's parameter, from `start` on, that are one box of a global tensor."""

    name: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Placement:
    """Where what this rank holds of one parameter lies in the global model."""

    master: Master
    parts: tuple[Part, ...]
    owned: bool  # this rank is the one among its replicas (data parallel, norms over tp) that writes it

    def shards(self, values: torch.Tensor, prefix: str = "") -> list[Shard]:
        """Views of `values`, which are as many as the master's, as boxes of global tensors."""
        flat = values.detach().view(-1)
        return [shard for part in self.parts for shard in _shards(part, flat, self.master.start, prefix)]


def _shards(part: Part, flat: torch.Tensor, start: int, prefix: str) -> Iterator[Shard]:
    """`flat` holds the parameter's elements from `start` on."""
    first = max(start, part.start)
    stop = min(start + flat.numel(), part.start + part.size)
    done = first - start
    for box in runs(part.shape, first - part.start, stop - part.start):
        view = flat[done : done + box.size].view(box.shape)
        done += box.size
        yield Shard(prefix + part.name, part.global_shape, box.moved(part.offset).offset, view)


def placements(
    chunks: Sequence[GPTModel], held: Iterable[Master], groups: ProcessGroupCollection
) -> list[Placement]:
    """One for each of the masters, in the order of the parameters' names."""
    by_parameter = {id(master.parameter): master for master in held}
    trainable = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    entries = {id(entry.data): entry for chunk in chunks for entry in _described(chunk, groups)}
    assert {id(p) for p in trainable} == set(entries), "a trainable parameter has no place, or a place none"
    return [
        Placement(by_parameter[key], tuple(_parts(entry)), _is_owned(entry, by_parameter[key]))
        for key, entry in entries.items()
        if key in by_parameter
    ]


def _described(
    chunk: GPTModel, groups: ProcessGroupCollection
) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.dp_cp}  # a name for every layer
    described = dict(sorted(chunk.sharded_state_dict(metadata=metadata).items()))
    for entry in described.values():
        is_tensor = isinstance(entry, ShardedTensor | ShardedTensorFactory)
        if is_tensor and isinstance(entry.data, torch.nn.Parameter):
            yield entry


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[Part]:
    parameter = entry.data.detach()
    whole = replace(entry, data=parameter)
    for part in whole.build() if isinstance(whole, ShardedTensorFactory) else [whole]:
        assert part.data.is_contiguous()
        start = part.data.storage_offset() - parameter.storage_offset()
        # an expert is one of a row of them in the global tensor
        shape = (1,) * part.prepend_axis_num + tuple(part.data.shape)
        yield Part(part.key, part.global_shape, part.global_offset, shape, start)


def _is_owned(entry: ShardedTensor | ShardedTensorFactory, master: Master) -> bool:
    """megatron-core numbers replicas by (pipeline, tensor, data): a share has none along the last."""
    return bool(is_main_replica(entry.replica_id[:-1] if master.is_share else entry.replica_id))
