"""Estimates, held against paper and pencil."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clusters.segment import ModelShape
from parallelism.costs import (
    PROCESS_BYTES,
    activation_bytes,
    chunks_in_flight,
    flops_per_token,
    memory_per_rank,
    stage_parameters,
)
from parallelism.layout import Layout
from tests.parallelism.test_layout import MODEL, TRAINING


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"qkv_bias": True}, {"qk_norm": True, "kv_channels": 16}], ids=str)
def test_the_stages_hold_the_whole_model(tied, more):
    model = replace(MODEL, vocabulary_size=1024, tied_embeddings=tied, **more)
    assert stage_parameters(model, Layout(), 0) == model.parameters
    stages = [stage_parameters(model, Layout(pp=2), stage) for stage in range(2)]
    duplicate = 1024 * model.hidden_size if tied else 0  # a tied table lives on the first and the last stage
    assert sum(stages) == model.parameters + duplicate


def test_tensor_parallelism_cuts_all_but_the_norms():
    norms = (2 * MODEL.layers + 1) * MODEL.hidden_size
    whole = stage_parameters(MODEL, Layout(), 0)
    assert stage_parameters(MODEL, Layout(tp=4), 0) == (whole - norms) // 4 + norms


def test_memory_by_hand():
    """One layer, counted on paper."""
    model = replace(MODEL, layers=1, vocabulary_size=512)
    tokens, h, kv, f = 2 * 32, 64, 32, 128
    activations = tokens * (9 * h + 3 * kv + 5 * f) * 4 + tokens * 512 * 12
    assert activation_bytes(model, TRAINING, Layout(), 0) == activations
    expected = model.parameters * 16 + activations * 3 // 2 + PROCESS_BYTES
    assert memory_per_rank(model, TRAINING, Layout()) == expected


def test_rounds_cost_three_copies_and_bf16_two_bytes_more_for_weights():
    values = stage_parameters(MODEL, Layout(), 0)
    without = memory_per_rank(MODEL, TRAINING, Layout())
    assert memory_per_rank(MODEL, TRAINING, Layout(), rounds=True) - without == 12 * values
    half = replace(TRAINING, precision="bf16")
    saved = activation_bytes(MODEL, TRAINING, Layout(), 0) - activation_bytes(MODEL, half, Layout(), 0)
    assert memory_per_rank(MODEL, half, Layout()) - without == 2 * values - saved * 3 // 2


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_splitting_a_model_makes_room(axis):
    big = replace(MODEL, layers=8, hidden_size=1024, ffn_hidden_size=4096, vocabulary_size=32000)
    needs = [memory_per_rank(big, TRAINING, Layout(**{axis: n})) for n in (1, 2, 4)]
    assert needs == sorted(needs, reverse=True)
    assert needs[2] - PROCESS_BYTES < (needs[0] - PROCESS_BYTES) * 0.6


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages():
    one_stage = activation_bytes(MODEL, TRAINING, Layout(pp=2), 0)
    few = replace(TRAINING, global_batch=2)  # a single micro-batch: never two in flight
    assert one_stage == 2 * activation_bytes(MODEL, few, Layout(pp=2), 0)
    last = activation_bytes(MODEL, TRAINING, Layout(pp=2), 1)
    assert last == activation_bytes(MODEL, few, Layout(pp=2), 1)  # the last stage never has more than one


def test_parameters_of_qwen():
    """Of Qwen2.5-0.5B and Qwen3-0.6B, as their files on huggingface.co hold them."""
    qwen2 = ModelShape(24, 896, 4864, 14, 2, 151936, tied_embeddings=True, qkv_bias=True)
    qwen3 = ModelShape(28, 1024, 3072, 16, 8, 151936, tied_embeddings=True, qk_norm=True, kv_channels=128)
    assert (qwen2.parameters, qwen3.parameters) == (494_032_768, 596_049_920)
    assert flops_per_token(qwen3, 4096) == 6 * 596_049_920 + 12 * 28 * 2048 * 4096


def test_flops_of_llama_2_7b():
    """6.74e9 parameters, 131M of them a lookup; 12 x 32 x 4096 x 4096 for attention."""
    llama = ModelShape(32, 4096, 11008, 32, 32, 32000)
    assert llama.parameters == 6_738_415_616
    assert flops_per_token(llama, 4096) == 6 * (6_738_415_616 - 131_072_000) + 12 * 32 * 4096 * 4096
    tied = replace(llama, tied_embeddings=True)
    assert flops_per_token(tied, 4096) == flops_per_token(llama, 4096)  # its one table still multiplies


def test_the_distributed_optimizer_shares_all_but_weights_and_gradients():
    values = stage_parameters(MODEL, Layout(), 0)
    for precision, cut in (("fp32", 8), ("bf16", 12)):
        training = replace(TRAINING, precision=precision)
        whole = memory_per_rank(MODEL, training, Layout(dp=4), rounds=True)
        shared = memory_per_rank(MODEL, training, Layout(dp=4, distributed_optimizer=True), rounds=True)
        assert whole - shared == (cut + 12) * values * 3 // 4


@pytest.mark.parametrize(
    ("layout", "micro_batches", "held"),
    [
        (Layout(pp=4), 8, [4, 3, 2, 1]),
        (Layout(pp=4), 2, [2, 2, 2, 1]),
        # Megatron's pictures of the interleaved schedule: a device's forward passes before its first backward
        (Layout(pp=4, vpp=2), 8, [11, 9, 7, 5]),
        (Layout(pp=2, vpp=2), 8, [5, 3]),
        (Layout(pp=2, vpp=2), 2, [4, 3]),
    ],
    ids=str,
)
def test_chunks_in_flight(layout, micro_batches, held):
    assert [chunks_in_flight(layout, micro_batches, stage) for stage in range(layout.pp)] == held


def test_virtual_stages_cost_activations():
    """The first of two stages: 2 micro-batches of 2 layers, or 5 chunks of 1."""
    plain = activation_bytes(MODEL, TRAINING, Layout(pp=2), 0)
    assert activation_bytes(MODEL, TRAINING, Layout(pp=2, vpp=2), 0) * 4 == plain * 5


def test_context_parallelism_shares_activations_but_for_keys_and_values():
    whole, half = (activation_bytes(MODEL, TRAINING, Layout(cp=cp), 0) for cp in (1, 2))
    keys_and_values = 2 * TRAINING.micro_batch * TRAINING.sequence_length * 4 * 8 * 4
    mask = TRAINING.sequence_length**2 // 2
    assert half == whole // 2 + MODEL.layers * (keys_and_values + mask)


def test_experts_are_divided_and_work_on_some_tokens():
    model = replace(MODEL, experts=4, experts_per_token=2, vocabulary_size=1024)
    assert stage_parameters(model, Layout(), 0) == model.parameters
    expert = 3 * model.hidden_size * model.ffn_hidden_size
    spread = stage_parameters(model, Layout(dp=2, ep=2), 0)
    assert model.parameters - spread == model.layers * 2 * expert
    dense = replace(model, experts=0)
    more = flops_per_token(model, 32) - flops_per_token(dense, 32)
    assert more == 6 * model.layers * (expert + 4 * model.hidden_size)  # one expert more, and the router


def test_the_distributed_optimizer_shares_experts_among_fewer():
    """Four copies of the dense part, two of every expert."""
    model = replace(MODEL, experts=4)
    whole, shared = (
        memory_per_rank(model, TRAINING, Layout(dp=4, ep=2, distributed_optimizer=on)) for on in (False, True)
    )
    experts = MODEL.layers * 2 * 3 * MODEL.hidden_size * MODEL.ffn_hidden_size
    dense = stage_parameters(model, Layout(dp=4, ep=2), 0) - experts
    assert whole - shared == 8 * (dense * 3 // 4 + experts // 2)
