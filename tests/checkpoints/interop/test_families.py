"""config.json <-> Shape, against transformers' own configurations."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from checkpoints.interop.families import config_of, shape_of
from checkpoints.interop.shape import Shape
from tests.checkpoints.interop.models import FAMILIES


def as_file(config: Any) -> dict[str, Any]:
    """What stands in config.json."""
    return dict(json.loads(config.to_json_string(use_diff=False)))


def test_the_shapes_of_the_families() -> None:
    small: dict[str, Any] = {
        "layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "attention_heads": 4, "query_groups": 2,
        "vocabulary_size": 300,
    }  # fmt: skip
    llama3 = {
        "rope_base": 50000.0,
        "rope_scaling": "llama3",
        "rope_factor": 4.0,
        "rope_original_positions": 16,
    }
    assert {name: shape_of(as_file(config)) for name, config in FAMILIES.items()} == {
        "llama": Shape(**small, **llama3),
        "mistral": Shape(**small, kv_channels=16, sliding_window=5),
        "qwen2": Shape(**small, tied_embeddings=True, qkv_bias=True),
        "qwen3": Shape(**small, kv_channels=16, qk_norm=True, rope_scaling="linear", rope_factor=3.0),
    }


@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config()])
def test_defaults_are_those_of_transformers(config: Any) -> None:
    """A file may leave out what its family takes for granted."""
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    kept = {name: getattr(config, name) for name in (*sizes, "model_type", "num_key_value_heads")}
    assert shape_of(kept) == shape_of(as_file(config))


def test_version_4_wrote_rope_otherwise() -> None:
    file = as_file(FAMILIES["llama"])
    scaling = file.pop("rope_parameters")
    file |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert shape_of(file) == shape_of(as_file(FAMILIES["llama"]))
    file["rope_scaling"] = {"type": "linear", "factor": 2.0}  # before there was "rope_type"
    assert (shape_of(file).rope_scaling, shape_of(file).rope_factor) == ("linear", 2.0)


@given(
    st.sampled_from([{"qkv_bias": True}, {"qk_norm": True}, {}]),
    st.sampled_from([None, 6]),
    st.booleans(),
    st.sampled_from([None, 16]),
    st.sampled_from([{}, {"rope_scaling": "linear", "rope_factor": 2.0}, {"rope_scaling": "llama3"}]),
)
def test_what_is_written_is_read_again(
    kind: dict[str, Any], window: int | None, tied: bool, width: int | None, rope: dict[str, Any]
) -> None:
    shape = Shape(
        3, 32, 64, 4, 2, 300, 7e4, 1e-5, tied, kv_channels=width, sliding_window=window, **kind, **rope
    )
    config = config_of(shape, "float32", 128)
    assert shape_of(config) == shape
    theirs = AutoConfig.for_model(**config)
    assert shape_of(as_file(theirs)) == shape  # transformers understands it as we do
    assert theirs.rope_parameters["rope_theta"] == 7e4
    assert theirs.max_position_embeddings == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gemma3"},
            r"model_type = gemma3: not known \(allowed: llama, mistral, qwen2, qwen3\)",
        ),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"allowed: LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, r"hidden_act = gelu: not supported \(allowed: silu\)"),
        ({"attention_bias": True}, "attention_bias = True: not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number of at least 1"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
        ({"vocab_size": "300"}, "vocab_size is 300"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_key_value_heads": 3}, "4 heads in 3 groups"),
        ({"head_dim": 7}, "do not fit"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_type = yarn: not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": [1]}, "rope_scaling is no table"),
    ],
)
def test_refusals_name_the_field_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        shape_of(as_file(FAMILIES["llama"]) | change)
    assert str(refusal.value).startswith("config.json: ")
    assert len(str(refusal.value)) < 300


def test_windows_of_all_layers_or_of_none() -> None:
    qwen = as_file(FAMILIES["qwen2"]) | {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
    assert shape_of(qwen | {"max_window_layers": 0}).sliding_window == 8
    assert shape_of(qwen | {"max_window_layers": 2}).sliding_window is None
    assert shape_of(qwen | {"use_sliding_window": False}).sliding_window is None
    assert shape_of(as_file(FAMILIES["mistral"]) | {"sliding_window": None}).sliding_window is None
    with pytest.raises(ValueError, match="all layers must attend alike"):
        shape_of(qwen | {"max_window_layers": 1})
    with pytest.raises(ValueError, match="all layers must attend alike"):
        shape_of(qwen | {"layer_types": ["full_attention", "sliding_attention"]})


def test_no_family_has_everything() -> None:
    with pytest.raises(ValueError, match="both qkv_bias and qk_norm"):
        config_of(Shape(2, 32, 64, 4, 2, 300, qkv_bias=True, qk_norm=True), "float32", 16)
