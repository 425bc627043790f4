"""The state of all random generators of a rank, as one row of bytes."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def random_state() -> torch.Tensor:
    """uint8 [N]: torch's on the CPU and on the device, then megatron-core's own in the order of names."""
    return torch.cat(_states())


def set_random_state(state: torch.Tensor) -> None:
    """Take up what `random_state` returned in a process of the same make."""
    cpu, device, *tracked = torch.split(state, [len(part) for part in _states()])
    torch.set_rng_state(cpu.clone())
    torch.cuda.set_rng_state(device.clone())
    names = sorted(get_cuda_rng_tracker().get_states())
    get_cuda_rng_tracker().set_states({name: s.clone() for name, s in zip(names, tracked, strict=True)})


def _states() -> list[torch.Tensor]:
    tracked = get_cuda_rng_tracker().get_states()
    return [torch.get_rng_state(), torch.cuda.get_rng_state(), *(tracked[name] for name in sorted(tracked))]
