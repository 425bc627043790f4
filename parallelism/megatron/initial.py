"""Initial weights: a pure function of seed, canonical name and global position.

So islands with different layouts begin bitwise equal, on any hardware: no layout enters, and every step is
exact. Philox (Salmon et al., SC 2011) turns a position into 64 random bits; the sum of their four 16-bit
fields is an integer that is nearly normal (Irwin-Hall: excess kurtosis -0.3, cut at 3.46 deviations, which
is where others truncate by hand); one correctly rounded product in fp64 scales it. A library's normal()
goes through log and cos, which differ between vector units and mathematics libraries.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch

from checkpoints.reader import Shard

STANDARD_DEVIATION = 0.02
# The last weight of each branch onto the residual stream: 2 per layer (Radford et al., GPT-2, 2019).
_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")

_MEAN = 4 * 65535 / 2  # of the sum of four uniform 16-bit integers
_SIGMA = math.sqrt(4 * (65536**2 - 1) / 12)
_WORDS = 4  # 64-bit words that Philox makes of one counter
_FIELDS = 4  # 16-bit fields in a word
_CHUNK = 1 << 20  # values made at a time: 8 MiB of random words


def fill(shard: Shard, seed: int, layers: int) -> None:
    """Set `shard.tensor` to its part of the initial model of `layers` layers; norms become 1, biases 0."""
    if shard.tensor.dim() == 1:
        shard.tensor.fill_(0.0 if shard.name.endswith(".bias") else 1.0)
        return
    *more, rows, columns = shard.tensor.shape
    assert math.prod(more) == 1  # one expert
    tensor = shard.tensor.view(rows, columns)
    width = shard.global_shape[-1]
    first_row = _row(shard)
    at_once = max(1, _CHUNK // width)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        values = random_values(seed, shard.name, (first_row + first) * width, count * width)
        values = values.reshape(count, width)[:, shard.offset[-1] : shard.offset[-1] + columns]
        scaled = (values * _scale(shard.name, layers)).astype(np.float32)
        tensor[first : first + count].copy_(torch.from_numpy(scaled))


def _row(shard: Shard) -> int:
    """Rows of the global tensor before the shard's first, counted over all experts."""
    row = 0
    for offset, side in zip(shard.offset[:-1], shard.global_shape[:-1], strict=True):
        row = row * side + offset
    return row


def _scale(name: str, layers: int) -> float:
    return STANDARD_DEVIATION / (math.sqrt(2 * layers) if name.endswith(_RESIDUAL) else 1.0)


def random_values(seed: int, name: str, start: int, count: int) -> npt.NDArray[np.float64]:
    """Values `start` to `start + count` of the tensor's endless stream, of mean 0 and deviation 1."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    skipped = start % _WORDS
    words = np.random.Philox(key=key, counter=start // _WORDS).random_raw(skipped + count)[skipped:]
    total = np.zeros(count, dtype=np.int32)
    for field in words.view(np.uint16).reshape(count, _FIELDS).T:
        total += field
    return (total.astype(np.float64) - _MEAN) / _SIGMA
