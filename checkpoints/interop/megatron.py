"""A model in Megatron's torch_dist: names and boxes are almost ours, the vocabulary's padding is not.

Megatron stacks the tensors of all layers by default ("decoder.layers.mlp...", layers first); others name
each. Where the optimizer's fp32 weights were saved too, they are taken instead of the rounded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.interop import torch_dist
from checkpoints.interop.shape import EMBEDDING, OUTPUT, Rows, Shape, counterparts
from checkpoints.interop.torch_dist import Entry
from checkpoints.interop.vocabulary import padding
from checkpoints.ranges import Box, intersect, subtract
from checkpoints.reader import Shard

LAYERS = "decoder.layers."
_PREFIXES = ("", "model.", "module.", "model.module.")
_MASTERS = "optimizer.state.fp32_param."


@dataclass(frozen=True)
class Wanted:
    """One of our tensors, and what of it a source must hold: all but the rows of padding."""

    name: str
    global_shape: tuple[int, ...]
    real: Box
    padding: Rows | None
    predicts: bool


def wanted(shape: Shape, padded_vocabulary: int) -> list[Wanted]:
    """All of our tensors, first to last."""
    found = {}
    for part in counterparts(shape, padded_vocabulary):
        for rows in part.rows:
            real = (part.padding.first if part.padding else rows.global_shape[0], *rows.global_shape[1:])
            box = Box((0,) * len(real), real)
            found[rows.ours] = Wanted(rows.ours, rows.global_shape, box, part.padding, part.predicts)
    return list(found.values())


def stacked(name: str) -> tuple[str, int] | None:
    """ "decoder.layers.3.x" is layer 3 of "decoder.layers.x"; None for what belongs to no layer."""
    if not name.startswith(LAYERS):
        return None
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    return f"{LAYERS}{rest}", int(layer)


class Model:
    """A directory of torch_dist that holds a model of known shape."""

    format = "torch_dist"
    positions = None

    def __init__(self, directory: Path, shape: Shape, multiple: int) -> None:
        """`multiple` is that of the padded vocabulary. Raises ValueError."""
        self.directory = directory
        self.shape = shape
        padded = -(-shape.vocabulary_size // multiple) * multiple
        self._entries = torch_dist.entries(directory)
        prefixes = [p for p in _PREFIXES if f"{p}{EMBEDDING}" in self._entries]
        if len(prefixes) != 1:
            raise ValueError(f"{directory}: has no tensor {EMBEDDING}: not a GPT of megatron-core")
        self._prefix = prefixes[0]
        self._wanted = wanted(shape, padded)
        found = [self._find(w) for w in self._wanted]
        self.dtypes = {_CODES.get(entry.dtype, entry.dtype) for _, entry, _ in found}
        self._refuse_others({name for name, _, _ in found})

    @property
    def bytes(self) -> int:
        return sum(4 * w.real.size for w in self._wanted)

    def shards(self, told: Callable[[int], object]) -> Iterator[Shard]:
        """All weights in fp32."""
        for want in self._wanted:
            name, entry, layer = self._find(want)
            total = torch.zeros(want.global_shape[1:], dtype=torch.float64)
            rest = [want.real]
            for box in entry.chunks:
                inner = box if layer is None else _of_layer(box, layer)
                common = intersect(inner, want.real) if inner else None
                if inner is None or common is None or not any(intersect(common, r) for r in rest):
                    continue
                rest = [left for r in rest for left in subtract(r, common)]
                values = torch_dist.read_chunk(self.directory, name, entry, box)
                values = values.reshape(inner.shape)[common.slices(inner)].to(torch.float32)
                told(values.nbytes)
                if want.padding and want.predicts:
                    total[common.slices(want.real)[1:]] += values.sum(dim=0, dtype=torch.float64)
                yield Shard(want.name, want.global_shape, common.offset, values)
            if rest:
                raise ValueError(f"{self.directory}: {name} lacks what lies at {rest[0].offset} of it")
            if want.padding:
                yield padding(want.padding, total / want.real.shape[0], predicts=want.predicts)

    def _find(self, want: Wanted) -> tuple[str, Entry, int | None]:
        """Name and boxes in the directory, and the layer where layers are stacked. Raises ValueError."""
        rounded = None
        for prefix in (_MASTERS, self._prefix):
            found = self._named(prefix, want)
            if found and self._fits(want, found[1], found[2]):
                return found
            rounded = found or rounded
        if rounded is None:
            raise ValueError(f"{self.directory}: has no tensor {self._prefix}{want.name}")
        shape = rounded[1].shape
        raise ValueError(f"{self.directory}: {rounded[0]} is {shape}; by its model {want.global_shape}")

    def _named(self, prefix: str, want: Wanted) -> tuple[str, Entry, int | None] | None:
        if (entry := self._entries.get(prefix + want.name)) is not None:
            return prefix + want.name, entry, None
        together = stacked(want.name)
        if together and (entry := self._entries.get(prefix + together[0])) is not None:
            return prefix + together[0], entry, together[1]
        return None

    def _fits(self, want: Wanted, entry: Entry, layer: int | None) -> bool:
        shape = entry.shape if layer is None else entry.shape[1:]
        if layer is not None and entry.shape[:1] != (self.shape.layers,):
            return False
        if want.name in (EMBEDDING, OUTPUT):  # Megatron pads the vocabulary to another multiple
            return len(shape) == 2 and shape[0] >= want.real.shape[0] and shape[1:] == want.real.shape[1:]
        return shape == want.real.shape

    def _refuse_others(self, taken: set[str]) -> None:
        """A weight too many: another kind of model, of which part would silently be lost."""
        ours = (f"{self._prefix}{LAYERS}", f"{self._prefix}embedding.", f"{self._prefix}output_layer.")
        plain = {name.replace(_MASTERS, self._prefix, 1) for name in taken}
        more = sorted(name for name in self._entries if name.startswith(ours) and name not in plain)
        more = [name for name in more if not name.endswith("_extra_state")]
        if more:
            raise ValueError(f"{self.directory}: {more[0][:100]!r} belongs to no model of this shape")


_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def _of_layer(box: Box, layer: int) -> Box | None:
    """What a box of stacked layers holds of one; chunks of torch_dist hold one layer each."""
    if box.shape[0] != 1:
        raise ValueError(f"a box of {box.shape[0]} layers at once is not supported")
    return Box(box.offset[1:], box.shape[1:]) if box.offset[0] == layer else None
