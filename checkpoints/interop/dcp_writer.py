"""Writes Megatron's torch_dist, by torch's own distributed checkpoints (DCP), a tensor at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from checkpoints.interop.megatron import LAYERS, stacked
from checkpoints.interop.torch_dist import TRACKER

# What megatron-core looks for before it reads: its own strategy, and everything that is no tensor.
_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Its layers ask for a state beside their weights and do nothing with None, which is what these hold.
_STATEFUL = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


def write(
    target: Path,
    step: int,
    layers: int,
    tensors: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Make `target` a directory that Megatron's --load takes; `tensors` are the shapes by our names,
    `read` gives the values, in `dtype`.

    Layers are stacked, as Megatron does by default. Padded rows of the vocabulary are written along.
    """
    place = target / f"iter_{step:07d}"
    place.mkdir()
    planner = _Planner(list(_items(layers, tensors, dtype)), read)
    writer = FileSystemWriter(place, single_file_per_rank=True, thread_count=1, sync_files=True)
    save({}, storage_writer=writer, planner=planner, no_dist=True)
    torch.save({"iteration": step, "checkpoint_version": 3.0}, place / "common.pt")
    (place / "metadata.json").write_text(json.dumps(_METADATA))
    (target / TRACKER).write_text(str(step))


def _items(
    layers: int, tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[WriteItem, str | None]]:
    for name, shape in tensors.items():
        together = stacked(name)
        if together is None:
            yield _item(name, shape, (0,) * len(shape), shape, dtype), name
        else:
            whole, offset = (layers, *shape), (together[1], *(0 for _ in shape))
            yield _item(together[0], whole, offset, (1, *shape), dtype), name
    for layer in range(layers):
        for part in _STATEFUL:
            index = MetadataIndex(f"{LAYERS}{part}._extra_state/shard_{layer}_{layers}")
            yield WriteItem(index=index, type=WriteItemType.BYTE_IO), None


def _item(
    name: str, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(whole))
    return WriteItem(
        index=MetadataIndex(name, torch.Size(offset)), type=WriteItemType.SHARD, tensor_data=data
    )


class _Planner(SavePlanner):
    """Hands tensors over when they are written, not before."""

    def __init__(
        self,
        items: list[tuple[WriteItem, str | None]],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        self.items = items
        self.read = read
        self._sources = {_key(item): name for item, name in items}

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """There is nothing to set up: the state is not in memory."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([item for item, _ in self.items])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = self._sources[_key(write_item)]
        if name is None:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # megatron-core keeps lists of such states
            nothing.seek(0)
            return nothing
        assert write_item.tensor_data is not None
        return self.read(name).view(write_item.tensor_data.chunk.sizes)


def _key(item: WriteItem) -> tuple[str, tuple[int, ...] | None]:
    return item.index.fqn, None if item.index.offset is None else tuple(item.index.offset)
