"""Small random models of the families that eurotrain takes in: made and read by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging

# initializer_range: ten times the usual, or attention would be nearly uniform and rotations go unseen
_SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES = {
    "llama": LlamaConfig(**_SMALL, rope_parameters=_LLAMA3),
    "mistral": MistralConfig(**_SMALL, sliding_window=5, head_dim=16),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(
        **_SMALL,
        head_dim=16,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    ),
}


def random_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """All tensors random, biases and norms too."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=float("norm" in name), std=0.2)
    return model


def saved_model(
    directory: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """Such a model, as transformers saves it."""
    logging.disable_progress_bar()
    model = random_model(family, dtype)
    model.save_pretrained(directory, **options)
    return model


def loaded_model(directory: Path) -> PreTrainedModel:
    logging.disable_progress_bar()
    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(tokens).logits
    return found
