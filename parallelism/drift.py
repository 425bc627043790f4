"""How far the islands' bases have drifted apart: they apply the same rounds, but GPUs round differently.

Every island sends a sketch of its base: for each tensor its norm and a few projections p_j = <R_j, base>
onto random signs R_j. Then E[(p_j(a) - p_j(b))^2] = |a - b|^2 (Alon, Matias and Szegedy, STOC 1996), so
some numbers tell |a - b| / |a| of whole tensors, every element counted. Signs are products of one sign per
row and one per column, drawn from a Philox stream of the tensor's name and dimension: any layout draws the
same, and a projection costs two passes over the tensor. fp64 sums leave a noise of about 1e-15.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch

from checkpoints.reader import Shard

PROJECTIONS = 8  # the estimate is then within a factor of two, nine times in ten
_CHUNK = 1 << 20  # elements turned into fp64 at a time: 8 MiB

Sketch = dict[str, list[float]]  # by tensor: the projections, then the sum of squares


def sketch(shards: Iterable[Shard]) -> Sketch:
    """Of these shards alone: those of all shards, each element once, are to be `added`."""
    found: Sketch = {}
    for shard in shards:
        values = [float(v) for v in _project(shard)]
        found = added([found, {shard.name: values}])
    return found


def added(sketches: Iterable[Sketch]) -> Sketch:
    """The sketch of all shards together."""
    total: Sketch = {}
    for one in sketches:
        for name, values in one.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0.0] * len(values)), values, strict=True)]
    return total


def _project(shard: Shard) -> torch.Tensor:
    """fp64 [PROJECTIONS + 1]."""
    tensor = shard.tensor.detach() if shard.offset else shard.tensor.detach().reshape(1)
    shape, offset = tuple(tensor.shape), shard.offset or (0,)
    signs = [_signs(shard.name, dim, offset[dim], side).to(tensor.device) for dim, side in enumerate(shape)]
    total = torch.zeros(PROJECTIONS + 1, dtype=torch.float64, device=tensor.device)
    at_once = max(1, _CHUNK // max(1, tensor[0].numel()))
    for first in range(0, shape[0], at_once):
        part = tensor[first : first + at_once].double()
        total[-1] += part.square().sum()
        rest = part.unsqueeze(-1)
        for dim in reversed(range(1, len(shape))):
            rest = (rest * signs[dim]).sum(dim) if rest.shape[-1] > 1 else rest.squeeze(-1) @ signs[dim]
        total[:-1] += (rest * signs[0][first : first + at_once]).sum(0)
    return total.cpu()


def _signs(name: str, dim: int, start: int, count: int) -> torch.Tensor:
    """Signs `start` to `start + count` of a dimension: fp64 [count, PROJECTIONS], each 1 or -1."""
    key = int.from_bytes(hashlib.sha256(f"drift {dim} {name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key, counter=start // 4).random_raw(start % 4 + count)[start % 4 :]
    bits = (words[:, None] >> np.arange(PROJECTIONS, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)
