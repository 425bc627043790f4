"""What the agent is asked when a segment is to be submitted: the site's scheduler, and what Slurm needs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from clusters.site import Site


def submission(
    site: Site, ranks: int, nodes: int, after: str, exclude: Sequence[str] = (), begin: float = 0.0
) -> dict[str, Any]:
    """Fields of the agent's `submit` beside the segment; `after` is the key that has to end first,
    `exclude` the nodes to keep away from, `begin` the earliest start in seconds since 1970.

    The ranks lie evenly on the nodes. Raises ValueError when the site does not give jobs so many nodes.
    """
    if problem := site.refuses(nodes):
        raise ValueError(f"{site.name}: {problem}")
    kept_away = {key: value for key, value in (("exclude", list(exclude)), ("begin", begin)) if value}
    told: dict[str, Any] = (
        {"scheduler": "slurm", "request": {**_request(site, ranks // nodes, nodes, after), **kept_away}}
        if site.is_slurm
        else {}
    )
    return {**told, **({"python": site.python} if site.python else {})}


def limits_question(site: Site, keys: Sequence[str]) -> dict[str, Any]:
    """The agent's operation that asks what the site allows; `keys`: segments that are not to be counted."""
    place = {"partition": site.partition_name or "", "qos": site.qos_name or ""}
    return {"op": "limits", "account": site.account, **place, "keys": list(keys)}


def _request(site: Site, ranks: int, nodes: int, after: str) -> dict[str, Any]:
    """Fields of clusters.slurm.Request; what is not known is left to the site's defaults."""
    whole = site.partition.whole_nodes
    told = {
        "account": site.account,
        "partition": site.partition_name,
        "qos": site.qos_name,
        "exclusive": bool(whole and whole.value),
        "after": [after] if after else None,
        "setup": [f"module load {name}" for name in site.own.modules] + _exports(site),
        "nodes": nodes,
        "cpus_per_node": _cpus(site, ranks),
        **_gpus(site, ranks),
    }
    return {key: value for key, value in told.items() if value}


def _cpus(site: Site, ranks: int) -> int:
    """So many ranks' share of a node's, as Slurm counts them; 0 where nobody tells how it does."""
    launch = site.machine.launch
    if launch.tasks_per_node is None or launch.cpus_per_task is None:
        return 0
    usable = launch.tasks_per_node.value * launch.cpus_per_task.value
    return math.ceil(usable * ranks / site.ranks_per_node)


def _exports(site: Site) -> list[str]:
    """The environment for collectives, the operator's word last; values may refer to the job's variables."""
    told = {name: fact.value for name, fact in site.machine.environment.items()} | dict(site.own.environment)
    return [f"export {name}={_quoted(value)}" for name, value in told.items()]


def _quoted(value: str) -> str:
    return '"' + re.sub(r'(["`\\])', r"\\\1", value) + '"'


def _gpus(site: Site, ranks: int) -> dict[str, Any]:
    """As the site writes them: "gpu:mi250:8" for a whole node becomes "gpu:mi250:2" for two ranks."""
    gres = site.device.gres
    if gres is None:
        return {"gpus_per_node": ranks}
    name = re.sub(r":\d+$", "", gres.value)
    return {"gres": f"{name}:{ranks}"}
