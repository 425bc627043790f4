"""The rows that pad the vocabulary: no token is theirs, but every logit is made beside theirs."""

from __future__ import annotations

import torch

from checkpoints.interop.shape import Rows
from checkpoints.reader import Shard


def padding(rows: Rows, mean: torch.Tensor, *, predicts: bool) -> Shard:
    """Rows of tokens that do not exist. Where logits are made with them they are the mean of all others.

    exp is convex, so the exponential of the mean logit is at most the mean of the exponentials: P such rows
    beside V real ones raise a loss by at most ln(1 + P / V), mostly by far less. Rows of zeros would weigh as
    much as a logit of 0 does, which in some models is a likely token's.
    """
    values = (mean if predicts else torch.zeros_like(mean)).to(torch.float32)
    offset = (rows.first, *(0 for _ in rows.global_shape[1:]))
    return Shard(rows.ours, rows.global_shape, offset, values.expand(rows.stop - rows.start, -1))
