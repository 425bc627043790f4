"""nccl with cuda (or rocm), or gloo with cpu: the only place that knows.

Nothing here runs at import: a parent that has imported everything and touched no device can fork ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# The supervisor kills a rank whose neighbour died, so this only ends what nobody watches. It must be longer
# than the longest silence between collectives: a checkpoint's fsync on a busy parallel file system.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Device:
    """What one rank computes on, and what its ranks talk through."""

    torch: torch.device
    backend: str

    @property
    def is_cpu(self) -> bool:
        return self.torch.type == "cpu"

    def synchronize(self) -> None:
        """Wait for what was queued: on a CPU nothing ever is."""
        if not self.is_cpu:
            torch.cuda.synchronize(self.torch)

    def pin(self, memory: Tensor) -> None:
        """Let the device itself copy into this memory of the host. Raises RuntimeError when it cannot."""
        if not self.is_cpu:
            error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)  # type: ignore[no-untyped-call]
            torch.cuda.check_error(int(error))


def pick() -> Device:
    """The device of this process, made current. ROCm builds of torch call theirs cuda and nccl as well."""
    if not torch.cuda.is_available():
        return Device(torch.device("cpu"), "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return Device(device, "nccl")


def join(device: Device, ranks: int) -> None:
    """Form the island's process group from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Without RANK in the environment this process is an island of one. Raises ValueError when there are not
    `ranks` processes: a launcher that was set up wrongly starts as many worlds of one, and all would train.
    """
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if there != ranks:
        raise ValueError(f"WORLD_SIZE = {there}: the segment's layout takes {ranks} ranks")
    if "RANK" in os.environ:
        dist.init_process_group(device.backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # listed nowhere, documented
        dist.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
