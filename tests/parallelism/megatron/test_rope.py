"""Rotary frequencies: against transformers, whose models we import."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clusters.segment import ModelShape
from parallelism.megatron.rope import inverse_frequencies
from tests.parallelism.samples import MODEL

LLAMA3 = replace(MODEL, kv_channels=128, rope_base=500000.0, rope_scaling="llama3", rope_factor=8.0)
LINEAR = replace(MODEL, kv_channels=64, rope_scaling="linear", rope_factor=2.5)


@pytest.mark.parametrize("model", [LLAMA3, replace(LLAMA3, rope_original_positions=2048), LINEAR])
def test_as_transformers_has_them(model: ModelShape) -> None:
    parameters = {"rope_type": model.rope_scaling, "rope_theta": model.rope_base, "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        parameters |= {
            "original_max_position_embeddings": model.rope_original_positions,
            "low_freq_factor": model.rope_low_frequency,
            "high_freq_factor": model.rope_high_frequency,
        }
    config = LlamaConfig(
        head_dim=model.head_dim,
        hidden_size=model.hidden_size,
        num_attention_heads=model.attention_heads,
        max_position_embeddings=1 << 20,
        rope_parameters=parameters,
    )
    theirs, _ = ROPE_INIT_FUNCTIONS[model.rope_scaling](config, torch.device("cpu"))
    assert torch.allclose(inverse_frequencies(model), theirs, rtol=1e-6, atol=0)


def test_plain_by_hand() -> None:
    model = replace(MODEL, kv_channels=8)
    assert inverse_frequencies(model).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


@given(st.floats(1.0, 64.0), st.integers(16, 1 << 20))
def test_stretching_slows_and_never_beyond_the_factor(factor: float, original: int) -> None:
    model = replace(LLAMA3, rope_factor=factor, rope_original_positions=original)
    plain, ours = inverse_frequencies(replace(model, rope_scaling="none")), inverse_frequencies(model)
    assert bool((ours <= plain * (1 + 1e-6)).all())
    assert bool((ours >= plain / factor * (1 - 1e-6)).all())
    assert bool((ours.diff() < 0).all())
