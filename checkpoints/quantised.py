"""Quantised pieces (checkpoints/formats.py) as tensors: encoding a shard, decoding a piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoints.formats import Quantised
from checkpoints.ranges import Box, Shape, intersect
from kernels.reference import dequantise, group_maxima, pack_nibbles, quantise, unpack_nibbles


@dataclass(frozen=True)
class CutMaxima:
    """The largest magnitudes of groups that a shard holds in part: the other part may have larger ones."""

    name: str  # of the tensor
    box: Box  # of groups: as elements, but the last dimension counts groups
    maxima: torch.Tensor  # fp32, of the box's shape, on the CPU


def cut_maxima(
    name: str, global_shape: Shape, offset: Shape, values: torch.Tensor, form: Quantised
) -> list[CutMaxima]:
    """At the first and the last group of each row, where they are cut: nothing, in most layouts."""
    if not offset:
        return []
    maxima = _maxima(values, offset, form)
    end = offset[-1] + values.shape[-1]
    cut = {0} if form.phase(offset) else set()
    cut |= {maxima.shape[-1] - 1} if end % form.group and end < global_shape[-1] else set()
    grid = _grid(offset, values, form)
    found = []
    for index in sorted(cut):
        where = Box((*grid.offset[:-1], grid.offset[-1] + index), (*grid.shape[:-1], 1))
        found.append(CutMaxima(name, where, maxima[..., index : index + 1].cpu()))
    return found


def encode(
    name: str, offset: Shape, values: torch.Tensor, form: Quantised, cuts: list[CutMaxima]
) -> torch.Tensor:
    """What stands for finite fp32 `values` at `offset` of tensor `name`: uint8, as it lies on disk.

    `cuts` are those of all shards of the tensor; others do no harm.
    """
    maxima, grid = _maxima(values, offset, form), _grid(offset, values, form)
    for cut in cuts:
        common = intersect(grid, cut.box) if cut.name == name else None
        if common is not None:
            mine, others = maxima[common.slices(grid)], cut.maxima[common.slices(cut.box)]
            torch.maximum(mine, others.to(mine.device), out=mine)
    rows = values if offset else values.reshape(1)
    codes, scales = quantise(rows, maxima, form.group, form.phase(offset), form.bits)
    packed = codes.view(torch.uint8).reshape(-1) if form.bits == 8 else pack_nibbles(codes)
    return torch.cat((scales.reshape(-1).view(torch.uint8), packed))


def decode(stored: torch.Tensor, offset: Shape, shape: Shape, form: Quantised) -> torch.Tensor:
    """The fp32 values of a piece of that `offset` and `shape`. `stored`: uint8, all its bytes."""
    scales_end = form.scale_bytes(offset, shape)
    scales = stored[:scales_end].clone().view(torch.bfloat16).view(form.groups(offset, shape))
    packed = stored[scales_end:]
    rows = shape or (1,)
    count = torch.Size(rows).numel()
    codes = packed.view(torch.int8) if form.bits == 8 else unpack_nibbles(packed, count)
    return dequantise(codes.view(rows), scales, form.group, form.phase(offset)).view(shape)


def _maxima(values: torch.Tensor, offset: Shape, form: Quantised) -> torch.Tensor:
    return group_maxima(values if offset else values.reshape(1), form.group, form.phase(offset))


def _grid(offset: Shape, values: torch.Tensor, form: Quantised) -> Box:
    """The groups that a shard has elements of, as a box; () for a scalar has one."""
    shape = form.groups(offset, tuple(values.shape))
    return Box((*offset[:-1], offset[-1] // form.group) if offset else (0,), shape)
