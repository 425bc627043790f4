"""Nodes that an island's chain keeps away from, each with the evidence against it. Pure functions.

Slurm's own word and the supervisor's count at once: an allocation that lost a node, a node whose runtime is
gone. Ranks that die count when they did so twice on one node without a checkpoint in between. A name counts
only if Slurm has allocated it to the segment: what is no node of the site's is never handed to sbatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clusters.hostlist import expand
from orchestrator.state import Evidence, IslandState, SegmentState

LASTS_SECONDS = 86400.0  # by then a site's own health check has drained the node, or it was not to blame
_DEATHS = 2  # of generations of ranks on one node, without a checkpoint in between


def excluded(island: IslandState, now: float) -> dict[str, list[Evidence]]:
    """Nodes by their names in Slurm, each with what speaks against it; what is older than a day does not."""
    found: dict[str, list[Evidence]] = {}
    for evidence in island.evidence:
        node = node_of(evidence.host, island.by_key[evidence.segment].nodes)
        if node and now - evidence.time < LASTS_SECONDS:
            found.setdefault(node, []).append(evidence)
    return found


def to_exclude(island: IslandState, always: Sequence[str], now: float) -> tuple[str, ...]:
    """What a submission names: the operator's own list and ours."""
    return tuple(sorted({*always, *excluded(island, now)}))


def node_of(host: str, nodes: frozenset[str]) -> str | None:
    """The host's name among those of Slurm, which knows nodes by their short names mostly."""
    return next((name for name in (host, host.split(".")[0]) if name in nodes), None)


# ---- how evidence is gathered, by orchestrator/fold.py


def observe_job(island: IslandState, segment: SegmentState, facts: Mapping[str, Any], when: float) -> None:
    """Take in which nodes a job has, and which of them it lost."""
    try:
        segment.nodes |= frozenset(expand(facts.get("nodes") or ""))
    except ValueError:
        return  # a name of Slurm's that cannot be read excludes nobody
    for incarnation in (facts, *facts.get("others", ())):
        for node in incarnation.get("lost_nodes", ()):
            segment.nodes |= {node}
            text = f"Slurm: job {incarnation['job_id']} lost it ({incarnation['slurm_state']})"
            blame(island, Evidence(node, segment.key, when, text))


def observe_death(
    island: IslandState, segment: SegmentState, host: str | None, text: str, when: float
) -> None:
    """The first death of a generation: its peers die of it, wherever they are."""
    if not host:
        return
    deaths = island.deaths.setdefault(host, [])
    deaths.append(text)
    if len(deaths) >= _DEATHS:
        why = (
            f"ranks died there {len(deaths)} times without a checkpoint in between: {'; '.join(deaths[-2:])}"
        )
        blame(island, Evidence(host, segment.key, when, why))


def blame(island: IslandState, evidence: Evidence) -> None:
    """The same word about the same node is heard once."""
    known = [(e.host, e.segment, e.text) for e in island.evidence]
    if (evidence.host, evidence.segment, evidence.text) not in known:
        island.evidence.append(evidence)


def trust(island: IslandState, node: str) -> None:
    """An operator knows better: what was said against a node is forgotten, what will be said is not."""
    island.evidence = [e for e in island.evidence if node not in (e.host, e.host.split(".")[0])]
    for host in [h for h in island.deaths if node in (h, h.split(".")[0])]:
        del island.deaths[host]
