"""The process groups of an island."""

from __future__ import annotations

from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from parallelism.device import COLLECTIVE_TIMEOUT
from parallelism.layout import Layout


def form_groups(layout: Layout, seed: int) -> ProcessGroupCollection:
    """All groups of `layout`, as one object; the default process group must exist.

    megatron-core 0.16 still looks some of them up in its global `parallel_state` (the layer that splits the
    vocabulary, sequence-parallel regions), so they are formed there and handed on as an object from here.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,  # an expert is small enough for one rank
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=False,  # a second set, which only the distributed optimizer's saver uses
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()
