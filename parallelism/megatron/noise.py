"""Warnings of megatron-core that ask nothing of whoever runs a training."""

from __future__ import annotations

import logging
import warnings

_EXPECTED = (
    # the default of a field for CUDA graphs, which nobody set
    "full scope is deprecated. Use empty cuda_graph_",
    # collectives that torch 2.13 renamed and megatron-core still calls by their old names
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    # a variable for overlap on Hopper: the site's environment decides
    "When using sequence parallelism it is recommended to set the environment variable",
)
# 0.19 would rather have HybridModel, which 0.16 lacks
_EXPECTED_OF_MODEL = "GPTModel IS DEPRECATED"


def hush() -> None:
    """Hold back these lines, and no others, in this process."""
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED_OF_MODEL)
