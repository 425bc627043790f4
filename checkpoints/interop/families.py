"""config.json of the Llama, Qwen and Mistral families <-> Shape. No torch; what cannot be kept is refused.

Field names and defaults are those of transformers' configuration_{llama,qwen2,qwen3,mistral}.py, both of
version 4 (rope_theta, rope_scaling) and of version 5 (rope_parameters). Written are version 4's, which both
read: version 4 takes rope_parameters for nothing and trains on with a base of 10000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.interop.shape import ROPE_SCALINGS, Shape

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LARGEST = 1 << 31  # any size in a config: larger ones are a mistake or an attack

_SIZES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "attention_heads": "num_attention_heads",
    "vocabulary_size": "vocab_size",
}
# What is allowed of fields that change the model, and that this one has not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_DEFAULT_HEAD = {"qwen3": 128}
_DEFAULT_WINDOW = {"mistral": 4096}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes. Raises ValueError: what is wrong, and what is allowed."""
    family = _family(config)
    for name, allowed in _PLAIN.items():
        if name in config and config[name] not in allowed:
            value = str(config[name])[:60]
            raise ValueError(f"config.json: {name} = {value}: not supported (allowed: {allowed[0]})")
    sizes: dict[str, Any] = {ours: _size(config, theirs) for ours, theirs in _SIZES.items()}
    heads, hidden = sizes["attention_heads"], sizes["hidden_size"]
    groups = _size(config, "num_key_value_heads", heads)
    width = _optional_size(config, "head_dim") or _DEFAULT_HEAD.get(family)
    if heads % groups or (width is None and hidden % heads) or (width or hidden // heads) % 2:
        raise ValueError(f"config.json: {heads} heads in {groups} groups do not fit a width of {hidden}")
    return Shape(
        **sizes,
        query_groups=groups,
        kv_channels=width if width != hidden / heads else None,
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings") is True,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_window(config, family, sizes["layers"]),
        **_rope(config),
    )


def _family(config: Mapping[str, Any]) -> str:
    family, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        allowed = ", ".join(ARCHITECTURES)
        raise ValueError(f"config.json: model_type = {str(family)[:60]}: not known (allowed: {allowed})")
    if architectures not in (None, [ARCHITECTURES[family]]):
        raise ValueError(
            f"config.json: architectures = {str(architectures)[:60]} (allowed: {ARCHITECTURES[family]})"
        )
    return family


def _window(config: Mapping[str, Any], family: str, layers: int) -> int | None:
    if family == "llama":
        return None
    window = _optional_size(config, "sliding_window", _DEFAULT_WINDOW.get(family))
    if family.startswith("qwen") and config.get("use_sliding_window") is not True:
        window = None
    kinds = config.get("layer_types")
    if kinds is None and family.startswith("qwen"):
        first = min(layers, _size(config, "max_window_layers", 28, least=0))
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if window is None or kinds is None or set(kinds) == {"sliding_attention"}:
        return window
    if set(kinds) != {"full_attention"}:
        raise ValueError("config.json: layer_types: all layers must attend alike, to a window or to all")
    return None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError("config.json: rope_scaling is no table")
    base = _number(given, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"config.json: rope_type = {str(kind)[:60]}: not supported (allowed: default, linear, llama3)"
        )
    scaling = {"rope_base": base, "rope_scaling": kind, "rope_factor": _number(given, "factor")}
    if kind == "llama3":
        scaling |= {
            "rope_original_positions": _size(given, "original_max_position_embeddings"),
            "rope_low_frequency": _number(given, "low_freq_factor"),
            "rope_high_frequency": _number(given, "high_freq_factor"),
        }
        if scaling["rope_low_frequency"] >= scaling["rope_high_frequency"]:
            raise ValueError("config.json: high_freq_factor must be above low_freq_factor")
    return scaling


def _size(table: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    value = table.get(name)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= LARGEST:
        told = "missing" if value is None else f"{str(value)[:60]}"
        raise ValueError(f"config.json: {name} is {told}; it must be a whole number of at least {least}")
    return value


def _optional_size(table: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    return default if name not in table else None if table[name] is None else _size(table, name)


def _number(table: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = table.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        told = "missing" if value is None else f"{str(value)[:60]}"
        raise ValueError(f"config.json: {name} is {told}; it must be a number above 0")
    return float(value)


def config_of(shape: Shape, dtype: str, positions: int) -> dict[str, Any]:
    """A config.json for the family that has all that `shape` has; `positions` is the longest sequence.

    Raises ValueError when no family has it all.
    """
    family = _family_of(shape)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{theirs: getattr(shape, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": shape.query_groups,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_base,
        "rope_scaling": _rope_scaling(shape),
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family == "llama":
        config["mlp_bias"] = False
    if family == "mistral":
        config["sliding_window"] = shape.sliding_window
    if family.startswith("qwen"):
        config["use_sliding_window"] = shape.sliding_window is not None
        config["sliding_window"] = shape.sliding_window
        config["max_window_layers"] = 0 if shape.sliding_window else shape.layers
    return config


def _family_of(shape: Shape) -> str:
    if shape.qkv_bias and shape.qk_norm:
        raise ValueError("no family known here has both qkv_bias and qk_norm")
    if shape.qk_norm:
        return "qwen3"
    if shape.qkv_bias:
        return "qwen2"
    return "mistral" if shape.sliding_window else "llama"


def _rope_scaling(shape: Shape) -> dict[str, Any] | None:
    if shape.rope_scaling == "none":
        return None
    scaling = {"rope_type": shape.rope_scaling, "factor": shape.rope_factor}
    if shape.rope_scaling == "llama3":
        scaling |= {
            "original_max_position_embeddings": shape.rope_original_positions,
            "low_freq_factor": shape.rope_low_frequency,
            "high_freq_factor": shape.rope_high_frequency,
        }
    return scaling
