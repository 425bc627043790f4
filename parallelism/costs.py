"""What a layout costs: values and bytes of a rank, floating-point operations of a token. No torch."""

from __future__ import annotations

from clusters.segment import ModelShape, Training
from parallelism.layout import VALUE_BYTES, Layout, padded_vocabulary

# Resident memory of a rank that has imported torch and megatron-core and formed its groups: 480 MB on CPU;
# a CUDA context with its communication buffers takes about as much on the device.
PROCESS_BYTES = 480_000_000


def layers_per_stage(model: ModelShape, layout: Layout) -> int:
    return model.layers // layout.pp


def stage_parameters(model: ModelShape, layout: Layout, stage: int) -> int:
    """Trainable values one rank of pipeline stage `stage` holds, the vocabulary's padding included.

    Weights are cut over tp; norms (2 per layer, 4 with qk_norm, 1 at the end) and routers are whole on every
    rank; experts are divided among ep ranks.
    """
    return _dense_parameters(model, layout, stage) + expert_parameters(model, layout)


def expert_parameters(model: ModelShape, layout: Layout) -> int:
    """Those of `stage_parameters` that are of experts."""
    expert = 3 * model.hidden_size * model.ffn_hidden_size
    return layers_per_stage(model, layout) * model.experts // layout.ep * expert


def _dense_parameters(model: ModelShape, layout: Layout, stage: int) -> int:
    h, d = model.hidden_size, model.head_dim
    cut = h * d * (2 * model.attention_heads + 2 * model.query_groups)
    cut += 0 if model.experts else 3 * h * model.ffn_hidden_size
    cut += model.qkv_bias * d * (model.attention_heads + 2 * model.query_groups)
    whole = 2 * h + model.qk_norm * 2 * d + model.experts * h
    values = layers_per_stage(model, layout) * (cut // layout.tp + whole)
    first, last = stage == 0, stage == layout.pp - 1
    tables = first + last - (first and last and model.tied_embeddings)
    return values + tables * padded_vocabulary(model) * h // layout.tp + last * h


def memory_per_rank(model: ModelShape, training: Training, layout: Layout, *, rounds: bool = False) -> int:
    """Estimated bytes of the fullest rank: weights, gradients, Adam, outer state, activations, process.

    Per value of the model (bytes): fp32 weight 4 and gradient 4, or bf16 weight 2 with an fp32 gradient
    4 and an fp32 master 4; Adam's two moments 8; with rounds the outer base 4, momentum 4 and one
    difference in the making 4. The distributed optimizer keeps whole weights and gradients, and its share
    of the rest. Activations take half as much again as what is kept of them, for the
    backward pass's temporaries and for what allocators do not give back. Resident memory of 16M parameters
    on CPU, in 1 rank, TP2 and PP2, was between 1 % less and 8 % more than this.
    """
    whole = 8 if training.precision == "fp32" else 6
    cut = (8 if training.precision == "fp32" else 12) + (12 if rounds else 0)
    shares = layout.dp * layout.cp if layout.distributed_optimizer else 1
    of_experts = shares * layout.tp // layout.ep if layout.distributed_optimizer else 1
    experts = expert_parameters(model, layout)
    fullest = max(
        -(-_dense_parameters(model, layout, stage) * (whole * shares + cut) // shares)
        + -(-experts * (whole * of_experts + cut) // of_experts)
        + activation_bytes(model, training, layout, stage) * 3 // 2
        for stage in range(layout.pp)
    )
    return fullest + PROCESS_BYTES


def activation_bytes(model: ModelShape, training: Training, layout: Layout, stage: int) -> int:
    """Bytes kept for the backward pass at the peak of the 1F1B schedule, without recomputation.

    Counted as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
    (arXiv 2205.05198, section 4), for this model: RMSNorm and SwiGLU, no dropout, and an attention that
    keeps no [s, s] scores. Values per token and layer, with sequence parallelism all divided by tp: of two
    norms the input, the normalised and the output 6h; q, k and v before rotation a + 2g and q and k after
    it a + g, where a is the width of all heads and g of all key groups; the attention's output a; SwiGLU's
    two halves, one of them copied, silu of the other and the product 5f. A token that goes to k experts has
    its way there and back 2h and the 5f k times, tokens being spread evenly. Torch's hooks for saved tensors
    count 2 % more. The last stage also holds one micro-batch's logits in the compute type and twice in fp32.
    """
    value = VALUE_BYTES[training.precision]
    q, kv = model.attention_heads * model.head_dim, model.query_groups * model.head_dim
    tokens = training.micro_batch * training.sequence_length // layout.cp
    per_token = 6 * model.hidden_size + 3 * q + 3 * kv
    per_token += (model.experts_per_token if model.experts else 1) * 5 * model.ffn_hidden_size
    per_token += model.experts_per_token * 2 * model.hidden_size if model.experts else 0
    layer = tokens * per_token * value // layout.tp
    if layout.cp > 1:  # keys and values of the whole sequence, and who sees whom
        layer += 2 * tokens * layout.cp * kv * value // layout.tp
        layer += training.sequence_length**2 // layout.cp
    chunk = layers_per_stage(model, layout) // layout.vpp
    kept = chunks_in_flight(layout, layout.micro_batches(training), stage) * chunk * layer
    if stage == layout.pp - 1:
        kept += tokens * padded_vocabulary(model) * (value + 8) // layout.tp
    return kept


def chunks_in_flight(layout: Layout, micro_batches: int, stage: int) -> int:
    """Micro-batches times chunks whose activations stage `stage` holds at once: p - i of 1F1B, and of the
    interleaved schedule with v chunks 2 (p - i - 1) + (v - 1) p + 1 (its warm-up and the one under way)."""
    p, v = layout.pp, layout.vpp
    warm = p - stage if v == 1 else 2 * (p - stage - 1) + (v - 1) * p + 1
    return min(warm, micro_batches * v)


def flops_per_token(model: ModelShape, sequence_length: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6N + 12 L H Q T: Chowdhery et al., "PaLM" (arXiv 2204.02311, appendix B), which grants no discount
    for causality; N leaves out the lookup in the input embedding, which multiplies nothing, and experts that
    a token does not go to.
    """
    lookup = 0 if model.tied_embeddings else model.vocabulary_size * model.hidden_size
    width = model.attention_heads * model.head_dim
    return 6 * (model.active_parameters - lookup) + 12 * model.layers * width * sequence_length
