"""Mixtures of experts without Transformer Engine."""

from __future__ import annotations

from megatron.core.transformer.moe import moe_utils


def without_transformer_engine() -> None:
    """Let the router multiply with torch: 0.16 asks whether a name is None that it never set."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
