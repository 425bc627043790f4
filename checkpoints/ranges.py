"""Boxes: hyper-rectangles of a tensor's indices, and how they meet. Pure arithmetic, no tensors.

Any layout reads what any other layout wrote, because both say which box of the global tensor they hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """The elements offset[d] <= index < offset[d] + shape[d] in every dimension d."""

    offset: Shape
    shape: Shape

    @property
    def end(self) -> Shape:
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Number of elements; 1 for the box of a scalar."""
        return math.prod(self.shape)

    def moved(self, by: Shape) -> Box:
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.shape)

    def slices(self, holder: Box) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds exactly `holder`."""
        return tuple(
            slice(o - h, o - h + s) for o, s, h in zip(self.offset, self.shape, holder.offset, strict=True)
        )


def intersect(a: Box, b: Box) -> Box | None:
    """What both have in common; None when that is no element."""
    low = tuple(max(pair) for pair in zip(a.offset, b.offset, strict=True))
    high = tuple(min(pair) for pair in zip(a.end, b.end, strict=True))
    if any(start >= stop for start, stop in zip(low, high, strict=True)):
        return None
    return Box(low, tuple(stop - start for start, stop in zip(low, high, strict=True)))


def subtract(a: Box, b: Box) -> list[Box]:
    """`a` without `b`: at most two disjoint boxes per dimension, none of them empty."""
    common = intersect(a, b)
    if common is None:
        return [a] if a.size else []
    rest = []
    low, high = list(a.offset), list(a.end)
    for d, (start, stop) in enumerate(zip(common.offset, common.end, strict=True)):
        for cut_low, cut_high in ((low[d], start), (stop, high[d])):
            if cut_low < cut_high:
                offset, end = [*low], [*high]
                offset[d], end[d] = cut_low, cut_high
                rest.append(Box(tuple(offset), tuple(e - o for o, e in zip(offset, end, strict=True))))
        low[d], high[d] = start, stop
    return rest


def runs(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The elements `start` <= i < `stop` of a row-major array, in order, as boxes.

    At most 2 x dimensions - 1 boxes, each of consecutive elements: a block of a file becomes few
    rectangles that can be copied at once, whatever the shape.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        yield from _within_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _within_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _within_row(shape, last, 0, stop - last * row)


def _within_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[Box]:
    for box in runs(shape[1:], start, stop):
        yield Box((row, *box.offset), (1, *box.shape))
