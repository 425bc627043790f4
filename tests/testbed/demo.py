"""`make demo-slurm`: the demo's model across two real Slurm sites, reached by SSH over the test bed's WAN.

The sites know nothing of each other and have no way out; the controller here carries what they exchange.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from orchestrator import demo
from orchestrator.home import Home
from tests.testbed.bed import Testbed, missing
from tests.testbed.spec import SCRATCH, SiteSpec

# What an operator writes for a machine that the catalogue does not know.
MACHINE = """\
title = "Slurm site {name} of the test bed"
operator = "you"
read = 2026-11-22

[sources]
bed = {{at = "tests/testbed"}}

[scheduler]
name = {{value = "Slurm", source = "bed"}}

[partition.{partition}]
source = "bed"
max_time = "02:00:00"
max_nodes = {nodes}

[device]
source = "bed"
name = "a fake GPU: its ranks run on the CPU"
gres = "gpu:{gpu}:{gpus}"
per_node = {gpus}
memory_gib = {{value = 4, status = "assumed"}}
peak_tflops = {{value = 0.06, status = "assumed"}}
efficiency = {{value = 0.2, status = "assumed"}}

[charge.gpus]
source = "bed"
unit = "GPU-hour"
rule = "slices"
per_slice_hour = 1
gpus_per_slice = 1
"""

SITE = """\
[{name}]
catalogue = "{name}"
host = "{name}"
scratch = "{scratch}/eurotrain"
account = "proj"
python = "{python}"
poll = "00:00:02"
"""

LAYOUTS = ({"tp": 2, "nodes": 2}, {"pp": 2})  # of the first site, on both its nodes, and the second
INNER_STEPS = 15


def prepare(bed: Testbed, home: Home, steps: int) -> Path:
    """Sites, budgets and data for a run over the test bed's sites; its run.toml."""
    write_sites(bed, home)
    data = home.root / "data"
    demo.make_data(data)
    run = home.root / "run.toml"
    run.write_text(run_toml(bed.sites, steps))
    return run


def write_sites(bed: Testbed, home: Home) -> None:
    """The operator's sites.toml, and what the catalogue lacks."""
    (home.root / "catalogue").mkdir(parents=True, exist_ok=True)
    for site in bed.sites:
        facts = {"name": site.name, "partition": site.partition, "gpu": site.gpu, "gpus": site.gpus_per_node}
        facts["nodes"] = len(site.nodes)
        (home.root / "catalogue" / f"{site.name}.toml").write_text(MACHINE.format(**facts))
    tables = [SITE.format(name=s.name, scratch=SCRATCH, python=sys.executable) for s in bed.sites]
    home.sites.write_text("\n".join(tables))


def run_toml(sites: tuple[SiteSpec, ...], steps: int) -> str:
    """The demo's run, with these sites for its islands."""
    head, _, _ = demo.run_toml(steps).partition("[[islands]]")
    islands = [
        f'[[islands]]\nsite = "{site.name}"\nallocation = "{site.name}-proj"\ntime_limit = "20min"\n'
        + "".join(f"{axis} = {size}\n" for axis, size in layout.items())
        for site, layout in zip(sites, LAYOUTS, strict=True)
    ]
    return head + "\n".join(islands)


def environment(bed: Testbed, home: Home) -> dict[str, str]:
    return {**os.environ, "EUROTRAIN_HOME": str(home.root), "EUROTRAIN_SSH_CONFIG": str(bed.ssh_config)}


def launch(bed: Testbed, home: Home, steps: int) -> int:
    """Grant, launch, and wait; the exit code of `eurotrain launch`."""
    run = prepare(bed, home, steps)
    eurotrain = str(Path(sys.executable).with_name("eurotrain"))
    for site in bed.sites:
        words = [eurotrain, "grant", f"{site.name}-proj", "10", "--unit", "GPU-hour", "--reference", "bed"]
        subprocess.run(words, check=True, env=environment(bed, home))
        words = [eurotrain, "stage", site.name, "--run", str(run)]
        subprocess.run(words, check=True, env=environment(bed, home))
    words = [eurotrain, "launch", str(run), "--yes"]
    return subprocess.run(words, check=False, env=environment(bed, home)).returncode


def main() -> int:
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    home = Home.from_environment()
    with Testbed(home.root / "testbed") as bed:
        return launch(bed, Home(home.root / "slurm"), demo.STEPS)


if __name__ == "__main__":
    sys.exit(main())
