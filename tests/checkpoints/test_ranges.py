"""Boxes against numpy index arrays of the same shape."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from checkpoints.ranges import Box, Shape, intersect, runs, subtract

SIDE = 6


@st.composite
def boxes(draw: st.DrawFn, dimensions: int) -> Box:
    offset = [draw(st.integers(0, SIDE)) for _ in range(dimensions)]
    return Box(tuple(offset), tuple(draw(st.integers(0, SIDE - o)) for o in offset))


pairs = st.integers(0, 3).flatmap(lambda n: st.tuples(boxes(n), boxes(n)))
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def marked(box: Box) -> np.ndarray:
    """How often each element of the whole space lies in the box."""
    space = np.zeros([SIDE] * len(box.shape), dtype=int)
    space[box.slices(Box((0,) * len(box.shape), space.shape))] += 1
    return space


@given(pairs)
def test_intersect_is_what_both_have(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = intersect(a, b)
    expected = marked(a) * marked(b)
    assert (common is None) == (not expected.any())
    if common is not None:
        assert (marked(common) == expected).all()


@given(pairs)
@example((Box((0, 0, 0), (6, 6, 6)), Box((1, 1, 1), (3, 3, 3))))  # corners belong to one box only
def test_subtract_gives_disjoint_boxes_of_the_rest(pair: tuple[Box, Box]) -> None:
    a, b = pair
    rest = subtract(a, b)
    total = sum((marked(box) for box in rest), np.zeros([SIDE] * len(a.shape), dtype=int))
    assert (total == marked(a) * (1 - marked(b))).all()  # nothing twice, nothing of b
    assert all(box.size for box in rest)
    assert len(rest) <= max(1, 2 * len(a.shape))


@given(shapes, st.data())
def test_runs_are_consecutive_elements(shape: Shape, data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(0, size))
    index = np.arange(size).reshape(shape)
    found = list(runs(shape, start, stop))
    whole = Box((0,) * len(shape), shape)
    elements = [int(i) for box in found for i in np.ravel(index[box.slices(whole)])]
    assert elements == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert all(box.size for box in found)


def test_a_block_of_a_matrix_is_three_rectangles() -> None:
    assert list(runs((4, 10), 7, 33)) == [
        Box((0, 7), (1, 3)),
        Box((1, 0), (2, 10)),
        Box((3, 0), (1, 3)),
    ]


@given(pairs)
def test_slices_place_a_box_inside_its_holder(pair: tuple[Box, Box]) -> None:
    holder, other = pair
    inner = intersect(holder, other)
    if inner is None:
        return
    space = np.arange(SIDE ** len(holder.shape)).reshape([SIDE] * len(holder.shape))
    whole = Box((0,) * len(holder.shape), space.shape)
    held = space[holder.slices(whole)]
    assert (held[inner.slices(holder)] == space[inner.slices(whole)]).all()


def test_moved_keeps_the_shape() -> None:
    assert Box((1, 2), (3, 4)).moved((10, 20)) == Box((11, 22), (3, 4))
