"""How the ranks of a segment lie on the nodes of its job: evenly, in the order of Slurm's nodes."""

from __future__ import annotations


def spread(ranks: int, tp: int, per_node: int, nodes: int | None = None) -> int:
    """On how many nodes: as few as hold the ranks, or as many as are asked for.

    Every node gets as many ranks as any other, neighbours in rank order. A tensor-parallel group, which
    talks in every layer, lies within one node where it fits; where it does not, or where more nodes are
    asked for, they hold even parts of it. Raises ValueError when the ranks cannot be laid on `nodes` so.
    """
    even = [n for n in range(1, ranks + 1) if not ranks % n and ranks // n <= per_node]
    allowed = [n for n in even if not (ranks // n) % tp or not tp % (ranks // n)]
    if nodes is None:
        return next(n for n in allowed if tp > per_node or crossing(ranks, tp, n) == 1)
    if nodes not in allowed:
        raise ValueError(
            f"nodes = {nodes}: {ranks} ranks in groups of tp = {tp}, at most {per_node} on a node, "
            f"lie evenly on {', '.join(map(str, allowed))}"
        )
    return nodes


def crossing(ranks: int, tp: int, nodes: int) -> int:
    """Nodes that a tensor-parallel group lies on."""
    return -(-tp * nodes // ranks)
