"""Pure arithmetic of layouts: coordinates, refusals, estimates."""

import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import ModelShape, Training
from parallelism.layout import (
    PROCESS_BYTES,
    VOCABULARY_MULTIPLE,
    Coordinates,
    Layout,
    activation_bytes,
    flops_per_token,
    memory_per_rank,
    padded_vocabulary,
    stage_parameters,
)

MODEL = ModelShape(
    layers=4, hidden_size=64, ffn_hidden_size=128, attention_heads=8, query_groups=4, vocabulary_size=1000
)
TRAINING = Training(steps=10, sequence_length=32, global_batch=8, micro_batch=2, learning_rate=1e-3)

sizes = st.integers(1, 5)
layouts = st.builds(Layout, tp=sizes, pp=sizes, dp=sizes, cp=sizes)


@given(layouts)
def test_ranks_and_coordinates_are_inverse(layout):
    seen = {layout.coordinates(rank) for rank in range(layout.ranks)}
    assert len(seen) == layout.ranks == prod([layout.tp, layout.pp, layout.dp, layout.cp])
    assert [layout.rank(layout.coordinates(r)) for r in range(layout.ranks)] == list(range(layout.ranks))


def test_megatrons_order_tensor_fastest_pipeline_slowest():
    layout = Layout(tp=2, pp=2, dp=2, cp=2)
    assert layout.coordinates(0) == Coordinates(tp=0, cp=0, dp=0, pp=0)
    assert layout.coordinates(1) == Coordinates(tp=1, cp=0, dp=0, pp=0)
    assert layout.coordinates(2) == Coordinates(tp=0, cp=1, dp=0, pp=0)
    assert layout.coordinates(4) == Coordinates(tp=0, cp=0, dp=1, pp=0)
    assert layout.coordinates(8) == Coordinates(tp=0, cp=0, dp=0, pp=1)


def test_expert_and_virtual_stages_add_no_ranks():
    assert Layout(tp=2, ep=4, vpp=3).ranks == 2


def test_names():
    assert str(Layout()) == "1 rank"
    assert str(Layout(tp=2, pp=4)) == "TP2 PP4"
    assert Layout.from_mapping({"tp": 2, "dp": 3}) == Layout(tp=2, dp=3)


def test_an_unknown_axis_is_answered_with_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"layout\.tpp: no such axis; did you mean tp\? \(allowed: tp, pp, dp"
    ):
        Layout.from_mapping({"tpp": 2})


@pytest.mark.parametrize(
    ("layout", "model", "training", "message"),
    [
        (
            Layout(tp=3),
            {},
            {},
            r"layout\.tp = 3: must divide model\.attention_heads = 8 \(allowed: 1, 2, 4, 8\)",
        ),
        (Layout(tp=8), {}, {}, r"layout\.tp = 8: must divide model\.query_groups = 4 \(allowed: 1, 2, 4\)"),
        (
            Layout(tp=4),
            {"ffn_hidden_size": 130},
            {},
            r"layout\.tp = 4: must divide model\.ffn_hidden_size = 130",
        ),
        (
            Layout(tp=4),
            {},
            {"sequence_length": 34},
            r"layout\.tp = 4: must divide training\.sequence_length = 34",
        ),
        (
            Layout(tp=3),
            {"attention_heads": 6, "query_groups": 3, "hidden_size": 96, "ffn_hidden_size": 99},
            {},
            r"layout\.tp = 3: must divide the padded vocabulary = 1024",
        ),
        (Layout(pp=3), {}, {}, r"layout\.pp = 3: must divide model\.layers = 4 \(allowed: 1, 2, 4\)"),
        (
            Layout(dp=3),
            {},
            {},
            r"training\.global_batch = 8: must be a multiple of .* x layout\.dp = 2 x 3 = 6",
        ),
        (Layout(cp=2), {}, {}, r"layout\.cp = 2: context parallelism not supported yet \(allowed: 1\)"),
        (Layout(ep=2), {}, {}, r"layout\.ep = 2: expert parallelism not supported yet"),
        (Layout(pp=2, vpp=2), {}, {}, r"layout\.vpp = 2: virtual pipeline stages not supported yet"),
        (Layout(tp=0), {}, {}, r"layout\.tp = 0: must be a whole number of at least 1"),
        (Layout(dp="2"), {}, {}, r"layout\.dp = '2': must be a whole number"),  # type: ignore[arg-type]
        (Layout(), {"layers": 0}, {}, r"model\.layers = 0: must be a whole number"),
        (
            Layout(),
            {"hidden_size": 60},
            {},
            r"model\.attention_heads = 8: must divide model\.hidden_size = 60",
        ),
        (
            Layout(),
            {"query_groups": 3},
            {},
            r"model\.query_groups = 3: must divide model\.attention_heads = 8",
        ),
        (Layout(), {"hidden_size": 72}, {}, r"= 9: rotary positions need it even"),
        (Layout(), {"kv_channels": 7}, {}, r"model\.kv_channels = 7: rotary positions need it even"),
        (Layout(), {"kv_channels": 0}, {}, r"model\.kv_channels = 0: must be a whole number"),
        (Layout(), {"sliding_window": -1}, {}, r"model\.sliding_window = -1: must be a whole number"),
        (
            Layout(),
            {"rope_scaling": "yarn"},
            {},
            r"model\.rope_scaling = 'yarn': not known \(allowed: none, linear, llama3\)",
        ),
        (
            Layout(),
            {"rope_low_frequency": 4.0},
            {},
            r"model\.rope_high_frequency = 4\.0: must be above model\.rope_low_frequency = 4\.0",
        ),
        (Layout(), {}, {"steps": 0}, r"training\.steps = 0: must be a whole number"),
        (
            Layout(),
            {},
            {"precision": "fp8"},
            r"training\.precision = 'fp8': not known \(allowed: fp32, bf16\)",
        ),
    ],
)
def test_refusals_name_field_value_and_what_is_allowed(layout, model, training, message):
    with pytest.raises(ValueError, match=message) as refusal:
        layout.validate(replace(MODEL, **model), replace(TRAINING, **training))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(pp=4), Layout(dp=4), Layout(tp=4, pp=2, dp=2)], ids=str
)
def test_layouts_that_can_train_are_let_through(layout):
    layout.validate(MODEL, TRAINING)
    assert layout.micro_batches(TRAINING) * layout.dp * TRAINING.micro_batch == TRAINING.global_batch


@given(st.integers(1, 300_000))
def test_the_padded_vocabulary_is_the_next_multiple(size):
    padded = padded_vocabulary(replace(MODEL, vocabulary_size=size))
    assert padded % VOCABULARY_MULTIPLE == 0
    assert 0 <= padded - size < VOCABULARY_MULTIPLE


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


def test_no_torch_is_imported():
    code = "import parallelism.layout, sys; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
