"""Attention beside its definition, with and without a window."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from parallelism.megatron.attention import Attention


def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v over the `window` last keys, one query and head at a time."""
    s, b, n, d = q.shape
    out = torch.empty(s, b, n, d)
    for t in range(s):
        first = max(0, t + 1 - window)
        for i in range(b):
            for h in range(n):
                g = h // (n // k.shape[2])
                weights = torch.softmax(k[first : t + 1, i, g] @ q[t, i, h] / d**0.5, dim=0)
                out[t, i, h] = weights @ v[first : t + 1, i, g]
    return out.flatten(2)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 10, 50])
def test_a_token_sees_so_many(window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(10, 2, heads, 8, generator=generator) for heads in (4, 2, 2))
    config = SimpleNamespace(kv_channels=8, window_size=(window - 1, 0) if window else None)
    found = Attention(config)(q, k, v)  # type: ignore[arg-type]
    torch.testing.assert_close(found, defined(q, k, v, window or 10), rtol=0, atol=1e-6)
