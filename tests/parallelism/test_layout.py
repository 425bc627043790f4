"""Pure arithmetic of layouts: coordinates, refusals."""

import subprocess
import sys
from dataclasses import asdict, replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import ModelShape, Training
from parallelism.layout import (
    VOCABULARY_MULTIPLE,
    Coordinates,
    Layout,
    padded_vocabulary,
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
    assert str(Layout(dp=2, distributed_optimizer=True)) == "DP2 ZeRO-1"
    assert Layout.from_mapping({"tp": 2, "dp": 3}) == Layout(tp=2, dp=3)
    assert Layout.from_mapping(asdict(Layout(distributed_optimizer=True))).distributed_optimizer is True


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
        (
            Layout(cp=2),
            {},
            {"sequence_length": 34},
            r"2 x layout\.tp x layout\.cp = 4: must divide training\.sequence_length = 34 \(allowed: 1, 2",
        ),
        (Layout(dp=2, ep=2), {}, {}, r"layout\.ep = 2: the model has no experts \(allowed: 1\)"),
        (Layout(tp=2), {"experts": 4}, {}, r"layout\.ep = 1: experts and layout\.tp = 2 need at least 2"),
        (Layout(dp=3, ep=3), {"experts": 4}, {}, r"layout\.ep = 3: must divide model\.experts = 4"),
        (
            Layout(dp=2, ep=4),
            {"experts": 4},
            {},
            r"layout\.ep = 4: must divide layout\.tp x layout\.cp x layout\.dp = 2 \(allowed: 1, 2\)",
        ),
        (
            Layout(),
            {"experts": 2, "experts_per_token": 3},
            {},
            r"model\.experts_per_token = 3: must be 1 to model\.experts = 2",
        ),
        (Layout(vpp=2), {}, {}, r"layout\.vpp = 2: virtual stages need a pipeline"),
        (
            Layout(pp=2, vpp=4),
            {},
            {},
            r"layout\.pp x layout\.vpp = 8: must divide model\.layers = 4 \(allowed: 1, 2, 4\)",
        ),
        (
            Layout(pp=2, vpp=2),
            {},
            {"global_batch": 6},
            r"training\.global_batch = 6: .* layout\.dp x layout\.pp = 4 with virtual stages",
        ),
        (
            Layout(distributed_optimizer=1),  # type: ignore[arg-type]
            {},
            {},
            r"layout\.distributed_optimizer = 1: must be true or false",
        ),
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
    "layout",
    [
        *(Layout(), Layout(tp=2), Layout(pp=4), Layout(dp=4), Layout(tp=4, pp=2, dp=2)),
        *(Layout(cp=2), Layout(tp=2, cp=4)),
        *(Layout(pp=2, vpp=2), Layout(pp=2, dp=2, vpp=2, distributed_optimizer=True)),
    ],
    ids=str,
)
def test_layouts_that_can_train_are_let_through(layout):
    layout.validate(MODEL, TRAINING)
    assert layout.micro_batches(TRAINING) * layout.dp * TRAINING.micro_batch == TRAINING.global_batch


@given(st.integers(1, 300_000))
def test_the_padded_vocabulary_is_the_next_multiple(size):
    padded = padded_vocabulary(replace(MODEL, vocabulary_size=size))
    assert padded % VOCABULARY_MULTIPLE == 0
    assert 0 <= padded - size < VOCABULARY_MULTIPLE


def test_no_torch_is_imported():
    code = "import parallelism.costs, sys; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
