"""How fast each pair of a head's values turns with the position."""

from __future__ import annotations

import math

import torch

from clusters.segment import ModelShape


def inverse_frequencies(model: ModelShape, device: torch.device | None = None) -> torch.Tensor:
    """fp32 [D / 2]: radians per position of pair i of a head of width D, base^(-2i / D), then stretched.

    RoPE: Su et al., arXiv 2104.09864. "linear" divides all by the factor: Chen et al., arXiv 2306.15595.
    "llama3" divides long wavelengths by it, leaves short ones alone and blends in between: Llama 3.1,
    `apply_scaling` in github.com/meta-llama/llama-models. megatron-core has the latter for 8192 original
    positions only.
    """
    d = model.head_dim
    plain = 1.0 / (model.rope_base ** (torch.arange(0, d, 2, dtype=torch.float32, device=device) / d))
    if model.rope_scaling == "none":
        return plain
    stretched = plain / model.rope_factor
    if model.rope_scaling == "linear":
        return stretched
    low, high = model.rope_low_frequency, model.rope_high_frequency
    turns = model.rope_original_positions * plain / (2 * math.pi)  # within the original positions
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * stretched + share * plain
