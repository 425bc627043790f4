"""Which box of every global tensor a rank of a layout writes: Megatron's cuts as arithmetic. No torch.

Column-parallel weights (and their biases) and tables are cut along their rows over the tensor-parallel ranks,
row-parallel weights along their columns; SwiGLU's first weight is two such weights, one above the other. The
distributed optimizer lays the parameters of a chunk end to end, last first, each at a multiple of 64 values,
pads the buffer to a multiple of 128 values and of its ranks, and gives each rank one equal share.
Tests hold this against what ranks of megatron-core write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from checkpoints.ranges import Box, Shape, runs
from clusters.segment import ModelShape
from parallelism.layout import Coordinates, Layout, padded_vocabulary

_PARAMETER_MULTIPLE = 64  # values: 128 bytes of bf16
_BUCKET_MULTIPLE = 128


@dataclass(frozen=True)
class Cut:
    """`rank` writes `box` of the tensor `name`."""

    rank: int
    name: str
    global_shape: Shape
    box: Box


@dataclass(frozen=True)
class _Parameter:
    name: str
    shape: Shape  # of the global tensor
    axis: int | None = None  # that is cut over tp; None: every tp rank has all of it
    halves: int = 1  # cut each by itself, one above the other
    own_bucket: bool = False
    is_replica: bool = False  # of what another stage writes
    expert: int | None = None  # the global tensor has a row of experts, this is one of them, cut over no tp

    def parts(self, tp: int, rank: int) -> list[Box]:
        """What tensor-parallel rank `rank` of `tp` holds, in the order in which it lies there."""
        if self.expert is not None:
            alone = _Parameter(self.name, self.shape[1:], 0, self.halves)
            return [Box((self.expert, *box.offset), (1, *box.shape)) for box in alone.parts(1, 0)]
        if self.axis is None:
            return [Box((0,) * len(self.shape), self.shape)]
        shape, offset = list(self.shape), [0] * len(self.shape)
        shape[self.axis] //= self.halves * tp
        boxes = []
        for half in range(self.halves):
            offset[self.axis] = (half * tp + rank) * shape[self.axis]
            boxes.append(Box(tuple(offset), tuple(shape)))
        return boxes


def cuts(model: ModelShape, layout: Layout) -> Iterator[Cut]:
    """Every element of every parameter in exactly one cut."""
    for stage in range(layout.pp):
        for virtual in range(layout.vpp):
            parameters = list(_chunk(model, layout, stage, virtual))
            if layout.ep > 1:  # experts have buffers, and data-parallel ranks, of their own
                experts = [parameter for parameter in parameters if parameter.expert is not None]
                parameters = [parameter for parameter in parameters if parameter.expert is None]
                for ep in range(layout.ep):
                    yield from _of_experts(experts, model, layout, stage, ep)
            for tp in range(layout.tp):
                yield from _of_chunk(parameters, layout, stage, tp)


def _of_experts(
    parameters: list[_Parameter], model: ModelShape, layout: Layout, stage: int, ep: int
) -> Iterator[Cut]:
    each, together = model.experts // layout.ep, layout.ranks // layout.pp
    held = [p for p in parameters if p.expert is not None and p.expert // each == ep]
    shares = together // layout.ep if layout.distributed_optimizer else 1
    for parameter, share, start, stop in _shares(held, 1, 0, shares):
        rank = stage * together + share * layout.ep + ep
        for box in _between(parameter.parts(1, 0), start, stop):
            yield Cut(rank, parameter.name, parameter.shape, box)


def _of_chunk(parameters: list[_Parameter], layout: Layout, stage: int, tp: int) -> Iterator[Cut]:
    shares = layout.dp * layout.cp if layout.distributed_optimizer else 1
    for parameter, share, start, stop in _shares(parameters, layout.tp, tp, shares):
        if parameter.is_replica or (parameter.axis is None and tp > 0):
            continue
        dp, cp = divmod(share, layout.cp)
        rank = layout.rank(Coordinates(tp=tp, cp=cp, dp=dp, pp=stage))
        for box in _between(parameter.parts(layout.tp, tp), start, stop):
            yield Cut(rank, parameter.name, parameter.shape, box)


def _between(parts: Iterable[Box], start: int, stop: int) -> Iterator[Box]:
    """Elements `start` to `stop` of boxes that lie one after the other."""
    begin = 0
    for part in parts:
        first, last = max(start - begin, 0), min(stop - begin, part.size)
        for box in runs(part.shape, first, last):
            yield box.moved(part.offset)
        begin += part.size


def _shares(
    parameters: list[_Parameter], tp: int, tp_rank: int, shares: int
) -> Iterator[tuple[_Parameter, int, int, int]]:
    """(parameter, share, start, stop): the share holds the parameter's elements from start to stop."""
    for bucket in _buckets(parameters):
        starts, position = [], 0
        for parameter in bucket:
            starts.append(position)
            size = sum(box.size for box in parameter.parts(tp, tp_rank))
            position = _rounded(position + size, _PARAMETER_MULTIPLE)
        end = starts[-1] + sum(box.size for box in bucket[-1].parts(tp, tp_rank))
        length = _rounded(end, math.lcm(shares, _BUCKET_MULTIPLE)) // shares
        for parameter, first in zip(bucket, starts, strict=True):
            size = sum(box.size for box in parameter.parts(tp, tp_rank))
            for share in range(first // length if shares > 1 else 0, shares):
                if shares == 1:
                    yield parameter, 0, 0, size
                    continue
                start, stop = share * length - first, (share + 1) * length - first
                if start >= size:
                    break
                yield parameter, share, max(start, 0), min(stop, size)


def _buckets(parameters: list[_Parameter]) -> Iterator[list[_Parameter]]:
    bucket: list[_Parameter] = []
    for parameter in reversed(parameters):
        if parameter.own_bucket:
            if bucket:
                yield bucket
            yield [parameter]
            bucket = []
        else:
            bucket.append(parameter)
    if bucket:
        yield bucket


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _chunk(model: ModelShape, layout: Layout, stage: int, virtual: int) -> Iterator[_Parameter]:
    """The parameters of one chunk of a stage, in the order of megatron-core's modules."""
    first = stage == 0 and virtual == 0
    last = stage == layout.pp - 1 and virtual == layout.vpp - 1
    table = (padded_vocabulary(model), model.hidden_size)
    tied = model.tied_embeddings
    if first:
        yield _Parameter("embedding.word_embeddings.weight", table, 0, own_bucket=tied and layout.pp > 1)
    layers = model.layers // (layout.pp * layout.vpp)
    begin = (virtual * layout.pp + stage) * layers
    for layer in range(begin, begin + layers):
        yield from _layer(model, f"decoder.layers.{layer}.")
    if last:
        yield _Parameter("decoder.final_layernorm.weight", (model.hidden_size,))
        if not tied:
            yield _Parameter("output_layer.weight", table, 0)
        elif not first:  # a copy of the first stage's table
            yield _Parameter("embedding.word_embeddings.weight", table, 0, own_bucket=True, is_replica=True)


def _layer(model: ModelShape, prefix: str) -> Iterator[_Parameter]:
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    q, qkv = model.attention_heads * d, (model.attention_heads + 2 * model.query_groups) * d
    attention, mlp = f"{prefix}self_attention.", f"{prefix}mlp."
    yield _Parameter(f"{attention}linear_qkv.layer_norm_weight", (h,))
    yield _Parameter(f"{attention}linear_proj.weight", (h, q), 1)
    yield _Parameter(f"{attention}linear_qkv.weight", (qkv, h), 0)
    if model.qkv_bias:
        yield _Parameter(f"{attention}linear_qkv.bias", (qkv,), 0)
    if model.qk_norm:
        yield _Parameter(f"{attention}q_layernorm.weight", (d,))
        yield _Parameter(f"{attention}k_layernorm.weight", (d,))
    yield _Parameter(f"{mlp}linear_fc1.layer_norm_weight", (h,))
    if model.experts:
        yield _Parameter(f"{mlp}router.weight", (model.experts, h))
        for expert in range(model.experts):
            first, second = (f"{mlp}experts.experts.linear_fc{n}.weight" for n in (1, 2))
            yield _Parameter(first, (model.experts, 2 * f, h), halves=2, expert=expert)
            yield _Parameter(second, (model.experts, h, f), expert=expert)
        return
    yield _Parameter(f"{mlp}linear_fc1.weight", (2 * f, h), 0, halves=2)
    yield _Parameter(f"{mlp}linear_fc2.weight", (h, f), 1)
