"""What the test bed consists of: sites, machines, networks, users; and the files they are configured by."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

CONF = Path(__file__).parent / "conf"
HUB_ADDRESS = "10.99.0.1"  # the operator's end of the WAN
USERS = {"alice": 2001, "bob": 2002}  # the same at every site; alice is the operator
MOUNT = "/run/site"  # where a machine sees its site's directory
SCRATCH = "/srv/scratch"


@dataclass(frozen=True)
class SiteSpec:
    """One site: a login machine that also runs Slurm's controllers, and compute nodes."""

    name: str
    index: int  # 1..; addresses follow from it
    gpu: str = "a100"
    partition: str = "boost"
    preemptible: str = "low"
    nodes: tuple[str, ...] = ("cn1", "cn2")
    gpus_per_node: int = 4
    egress: bool = False  # whether compute nodes reach the WAN
    energy: bool = False  # Cray's counters at every node, which Slurm then books

    @property
    def lan(self) -> str:
        return f"10.{100 + self.index}.0"

    @property
    def login_address(self) -> str:
        return f"{self.lan}.1"

    @property
    def wan_address(self) -> str:
        return f"10.99.{self.index}.1"

    def node_address(self, node: str) -> str:
        return f"{self.lan}.{11 + self.nodes.index(node)}"

    @property
    def machines(self) -> tuple[str, ...]:
        return ("login", *self.nodes)


def default_sites(energy: bool = False) -> tuple[SiteSpec, ...]:
    """Two sites that differ where real ones do."""
    return (
        SiteSpec("north", 1, energy=energy),
        SiteSpec("south", 2, gpu="mi250", partition="gpu", preemptible="spare", egress=True, energy=energy),
    )


def configuration(site: SiteSpec) -> dict[str, str]:
    """Slurm's and sshd's files by name."""
    nodes = "\n".join(f"NodeName={n} NodeAddr={site.node_address(n)}" for n in site.nodes)
    values = {
        "site": site.name,
        "address": site.login_address,
        "energy": "pm_counters" if site.energy else "none",
        "gpu": site.gpu,
        "gpus": str(site.gpus_per_node),
        "last_gpu": str(site.gpus_per_node - 1),
        "partition": site.partition,
        "preemptible": site.preemptible,
        "nodes": nodes,
        "mount": MOUNT,
    }
    return {p.name: string.Template(p.read_text()).substitute(values) for p in sorted(CONF.iterdir())}


def accounting(site: SiteSpec) -> str:
    """Associations and limits, as lines for sacctmgr.

    `small` has a budget of two GPU-minutes, `brief` a QOS with limits of the kind that sites set.
    """
    lines = [
        "add qos brief set MaxWall=00:05:00 MaxSubmitJobsPerUser=3 Priority=5",
        f"add account proj Cluster={site.name} Description=p Organization=e",
        f"add account small Cluster={site.name} Description=s Organization=e",
        f"add user alice Account=proj Cluster={site.name} DefaultAccount=proj",
        f"add user alice Account=small Cluster={site.name}",
        f"add user bob Account=proj Cluster={site.name} DefaultAccount=proj",
        f"modify user alice bob where cluster={site.name} set qos+=brief",
        f"modify account small where cluster={site.name} set GrpTRESMins=gres/gpu=2",
    ]
    return "\n".join(lines) + "\n"


def hosts(site: SiteSpec) -> str:
    nodes = "".join(f"{site.node_address(n)} {n}\n" for n in site.nodes)
    return f"127.0.0.1 localhost\n{site.login_address} login {site.name}\n{nodes}"
