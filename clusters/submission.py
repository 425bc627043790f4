"""What the agent is asked when a segment is to be submitted: the site's scheduler, and what Slurm needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from clusters.site import Site


def submission(site: Site, ranks: int, after: str, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of the agent's `submit` beside the segment; `after` is the key that has to end first,
    `exclude` the nodes to keep away from.

    Raises ValueError when the ranks do not fit on one node: a runtime across nodes is not there yet.
    """
    kept_away = {"exclude": list(exclude)} if exclude else {}
    told: dict[str, Any] = (
        {"scheduler": "slurm", "request": {**_request(site, ranks, after), **kept_away}}
        if site.is_slurm
        else {}
    )
    return {**told, **({"python": site.python} if site.python else {})}


def _request(site: Site, ranks: int, after: str) -> dict[str, Any]:
    """Fields of clusters.slurm.Request; what is not known is left to the site's defaults."""
    if ranks > site.ranks_per_node:
        raise ValueError(
            f"{site.name}: {ranks} ranks, and a node has {site.ranks_per_node}: segments of several nodes "
            "are not there yet"
        )
    whole = site.partition.whole_nodes
    told = {
        "account": site.account,
        "partition": site.partition_name,
        "qos": site.qos_name,
        "exclusive": bool(whole and whole.value),
        "after": [after] if after else None,
        "setup": [f"module load {name}" for name in site.own.modules],
        **_gpus(site, ranks),
    }
    return {key: value for key, value in told.items() if value}


def _gpus(site: Site, ranks: int) -> dict[str, Any]:
    """As the site writes them: "gpu:mi250:8" for a whole node becomes "gpu:mi250:2" for two ranks."""
    gres = site.device.gres
    if gres is None:
        return {"gpus_per_node": ranks}
    name = re.sub(r":\d+$", "", gres.value)
    return {"gres": f"{name}:{ranks}"}
