from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.spread import crossing, spread


@pytest.mark.parametrize(
    ("ranks", "tp", "per_node", "nodes"),
    [(4, 4, 4, 1), (5, 1, 4, 5), (6, 2, 4, 3), (6, 3, 4, 2), (8, 2, 4, 2), (16, 8, 4, 4), (3, 3, 2, 3)],
)  # fmt: skip
def test_as_few_nodes_as_hold_the_ranks(ranks: int, tp: int, per_node: int, nodes: int) -> None:
    assert spread(ranks, tp, per_node) == nodes


def test_more_nodes_can_be_asked_for_even_across_a_tensor_parallel_group() -> None:
    assert spread(2, 2, 4, nodes=2) == 2
    assert crossing(2, 2, 2) == 2
    assert [crossing(8, 4, nodes) for nodes in (1, 2, 4, 8)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("nodes", "ranks", "tp", "there"), [(1, 8, 2, "2, 4, 8"), (3, 8, 2, "2, 4, 8"), (4, 12, 2, "3, 6, 12")]
)
def test_what_does_not_lie_evenly_is_refused(nodes: int, ranks: int, tp: int, there: str) -> None:
    why = f"nodes = {nodes}: {ranks} ranks in groups of tp = {tp}, at most 4 on a node, lie evenly on {there}"
    with pytest.raises(ValueError, match=f"^{why}$"):
        spread(ranks, tp, 4, nodes)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 8))
def test_every_node_gets_as_many_and_no_group_is_cut_without_need(
    tp: int, groups: int, per_node: int
) -> None:
    ranks = tp * groups
    nodes = spread(ranks, tp, per_node)
    here = ranks // nodes
    assert here * nodes == ranks
    assert here <= per_node
    most = max(len({rank // here for rank in range(g * tp, (g + 1) * tp)}) for g in range(groups))
    assert most == crossing(ranks, tp, nodes)
    if tp <= per_node:
        assert most == 1


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 8), st.integers(1, 96))
def test_what_is_asked_for_is_given_or_refused(tp: int, groups: int, per_node: int, nodes: int) -> None:
    ranks = tp * groups
    here, rest = divmod(ranks, nodes)
    fits = not rest and here <= per_node and (here % tp == 0 or tp % here == 0)
    try:
        assert spread(ranks, tp, per_node, nodes) == nodes
    except ValueError:
        assert not fits
    else:
        assert fits
