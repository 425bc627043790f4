"""An invented machine, as an operator would write it: the tests' stand-in for a real one."""

from __future__ import annotations

from pathlib import Path

EXAMPLAR = """\
title = "Examplar"
operator = "Nobody, Nowhere"
read = 2026-11-21

[sources]
guide = {at = "https://example.org/guide", date = "2026-01"}
note = {at = "https://example.org/note", kind = "third party", read = 2026-11-22}

[scheduler]
name = {value = "Slurm", source = "guide"}

[partition]
source = "guide"
wide = {max_time = "1-12:00:00", max_nodes = 10, whole_nodes = true, nodes = 40}
shared = {max_time = {value = "06:00:00", conflict = ["the note: 12 h"]}, max_nodes = 2, whole_nodes = false}

[partition.new]
source = "note"
nodes = 8
device = {name = "Other GPU", memory_gib = 80}

[qos]
source = "guide"
tenth = {max_nodes_percent = 10}
long = {max_time = "3-00:00:00", max_nodes = 3}
one = {max_gpus = 1, max_time = "01:00:00"}

[node]
source = "guide"
count = 50
cores = 32
threads = {value = 64, status = "derived", note = "32 cores, 2 threads each"}
slurm_memory_mib = 262144

[device]
source = "guide"
name = "GPU"
per_node = 4
memory_gb = 40
peak_tflops = 100.5

[environment]
source = "guide"
NCCL_NET = "IB"
NCCL_PROTO = {value = "Simple", source = "note", note = "against hangs"}

[charge.whole]
source = "guide"
unit = "core-hour"
rule = "nodes"
per_node_hour = 32

[charge.parts]
source = "guide"
unit = "core-hour"
partitions = ["shared"]
rule = "slices"
per_slice_hour = 8
gpus_per_slice = 1
cores_per_slice = 8
memory_gib_per_slice = 64
"""


def write_examplar(folder: Path, old: str = "", new: str = "") -> Path:
    """The machine's file in a folder, with one passage replaced."""
    assert old in EXAMPLAR
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "examplar.toml"
    path.write_text(EXAMPLAR.replace(old, new, 1) if old else EXAMPLAR + new)
    return path
