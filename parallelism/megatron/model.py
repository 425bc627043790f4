"""The model: ModelShape and Layout in, one rank's part of a GPT out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from clusters.segment import ModelShape, Training
from parallelism.layout import Layout, padded_vocabulary
from parallelism.megatron.attention import Attention
from parallelism.megatron.norm import RMSNorm
from parallelism.megatron.rope import inverse_frequencies

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(model: ModelShape, training: Training, layout: Layout) -> TransformerConfig:
    """megatron-core's configuration of this model in this layout."""
    dtype = DTYPES[training.precision]
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        window_size=(model.sliding_window - 1, 0) if model.sliding_window else None,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.precision == "bf16",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        num_moe_experts=model.experts or None,
        moe_ffn_hidden_size=model.ffn_hidden_size if model.experts else None,
        moe_router_topk=model.experts_per_token,
        # megatron-core weighs it by a rank's own tokens: fewer with sequence and context parallelism
        moe_aux_loss_coeff=model.balance_loss * layout.tp * layout.cp,
        moe_router_dtype="fp32",  # the choice of experts is a discontinuity: bf16 would move it
        moe_token_dispatcher_type="alltoall",  # noqa: S106 - these tokens are no passwords
        sequence_parallel=layout.tp > 1,
        # weights come from parallelism/megatron/initial.py; `perform_initialization=False` would also leave
        # them unmarked as tensor-parallel, and the norm of the gradients would miss most of them
        init_method=_leave_undefined,
        output_layer_init_method=_leave_undefined,
        embedding_init_method=_leave_undefined,
        calculate_per_token_loss=True,  # before DDP is built, or its gradients are divided by dp once more
        # fused kernels of apex, which nobody has to install
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # Sending and receiving as one batch; of virtual stages one by one, because batches between two ranks
        # mix those of several chunks up. An output that is still being sent must not be freed then: on gloo
        # it is silently overwritten.
        batch_p2p_comm=layout.vpp == 1,
        batch_p2p_sync=False,
        overlap_p2p_comm=layout.vpp > 1,
        deallocate_pipeline_outputs=layout.vpp == 1,
    )


def build_model(
    config: TransformerConfig,
    model: ModelShape,
    training: Training,
    groups: ProcessGroupCollection,
    layout: Layout,
) -> list[DistributedDataParallel]:
    """This rank's layers, one chunk for each virtual stage, their weights still undefined, behind gradient
    buffers in fp32."""
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    chunks = []
    for virtual in range(layout.vpp):
        gpt = _chunk(config, model, training, groups, virtual)
        if config.bf16:
            gpt = Float16Module(config, gpt)
        chunks.append(DistributedDataParallel(config, buffers, gpt, virtual > 0, groups))
    return chunks


def _chunk(
    config: TransformerConfig,
    model: ModelShape,
    training: Training,
    groups: ProcessGroupCollection,
    virtual: int,
) -> GPTModel:
    stage, stages = groups.pp.rank(), groups.pp.size()
    chunks = config.virtual_pipeline_model_parallel_size
    gpt = GPTModel(
        config,
        _layers(config, stage, virtual if chunks else None),
        padded_vocabulary(model),
        training.sequence_length,
        pre_process=stage == 0 and virtual == 0,
        post_process=stage == stages - 1 and virtual == (chunks or 1) - 1,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        pg_collection=groups,
        vp_stage=virtual if chunks else None,
    )
    gpt.rotary_pos_emb.inv_freq = inverse_frequencies(model, gpt.rotary_pos_emb.inv_freq.device)
    return gpt


def _leave_undefined(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _layers(config: TransformerConfig, stage: int, virtual: int | None) -> TransformerBlockSubmodules:
    layer: ModuleSpec = get_gpt_layer_local_spec(
        config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = Attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        [layer] * get_num_layers_to_build(config, vp_stage=virtual, pp_rank=stage), layer_norm=RMSNorm
    )
