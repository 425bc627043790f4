"""The model that a checkpoint holds, and which tensors it has: ours beside those of Hugging Face. No torch.

Ours are megatron-core's: queries, keys and values in one weight, group after group (the queries of a group,
its key, its value); the two halves of SwiGLU's first weight in another; the vocabulary padded with rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

ROPE_SCALINGS = ("none", "linear", "llama3")


_OF_EXPERTS = ("experts_per_token", "balance_loss")  # say nothing where there are no experts


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder, in the words of a run's [model] table (clusters/segment.py: ModelShape)."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    attention_heads: int
    query_groups: int
    vocabulary_size: int
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    kv_channels: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_positions: int = 8192
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Shape:
        """The model of a checkpoint's facts. Raises ValueError when it has what no family here has."""
        model = facts.get("model")
        if not isinstance(model, dict):
            raise ValueError("the checkpoint does not tell the shape of its model")
        known = {f.name for f in fields(cls)}
        for name, value in model.items():
            if name not in known and value and name not in _OF_EXPERTS:
                raise ValueError(f"a model with {name} = {value} belongs to none of the families known here")
        return cls(**{name: value for name, value in model.items() if name in known})

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.attention_heads

    @property
    def heads_per_group(self) -> int:
        return self.attention_heads // self.query_groups


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of one of theirs are rows `first`, ... of one of ours."""

    ours: str
    global_shape: tuple[int, ...]
    first: int
    start: int
    stop: int


@dataclass(frozen=True)
class Counterpart:
    """A tensor of theirs, and where its rows lie in ours, in their order."""

    theirs: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...] = field(repr=False)
    padding: Rows | None = None  # rows of ours beyond all of theirs
    predicts: bool = False  # whether its rows are what logits are made with


EMBEDDING, FINAL_NORM, OUTPUT = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


def counterparts(shape: Shape, padded_vocabulary: int) -> Iterator[Counterpart]:
    """All tensors of a model, first to last; those made of one of ours follow one another."""
    h = shape.hidden_size
    yield _table(shape, "model.embed_tokens.weight", EMBEDDING, padded_vocabulary, shape.tied_embeddings)
    for layer in range(shape.layers):
        yield from _layer(shape, f"model.layers.{layer}.", f"decoder.layers.{layer}.")
    yield _same("model.norm.weight", FINAL_NORM, (h,))
    if not shape.tied_embeddings:
        yield _table(shape, "lm_head.weight", OUTPUT, padded_vocabulary, predicts=True)


def _layer(shape: Shape, theirs: str, ours: str) -> Iterator[Counterpart]:
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    attention = f"{ours}self_attention."
    yield _same(f"{theirs}input_layernorm.weight", f"{attention}linear_qkv.layer_norm_weight", (h,))
    yield from _queries_keys_values(shape, f"{theirs}self_attn.", f"{attention}linear_qkv.weight", (h,))
    if shape.qkv_bias:
        yield from _queries_keys_values(shape, f"{theirs}self_attn.", f"{attention}linear_qkv.bias", ())
    if shape.qk_norm:
        yield _same(f"{theirs}self_attn.q_norm.weight", f"{attention}q_layernorm.weight", (d,))
        yield _same(f"{theirs}self_attn.k_norm.weight", f"{attention}k_layernorm.weight", (d,))
    projection = (h, shape.attention_heads * d)
    yield _same(f"{theirs}self_attn.o_proj.weight", f"{attention}linear_proj.weight", projection)
    yield _same(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp.linear_fc1.layer_norm_weight", (h,))
    for place, half in enumerate(("gate", "up")):
        rows = Rows(f"{ours}mlp.linear_fc1.weight", (2 * f, h), place * f, 0, f)
        yield Counterpart(f"{theirs}mlp.{half}_proj.weight", (f, h), (rows,))
    yield _same(f"{theirs}mlp.down_proj.weight", f"{ours}mlp.linear_fc2.weight", (h, f))


def _queries_keys_values(
    shape: Shape, theirs: str, ours: str, columns: tuple[int, ...]
) -> Iterator[Counterpart]:
    d, per_group, groups = shape.head_dim, shape.heads_per_group, shape.query_groups
    stride = (per_group + 2) * d
    kind = ours.rpartition(".")[2]
    for letter, before, heads in (("q", 0, per_group), ("k", per_group, 1), ("v", per_group + 1, 1)):
        rows = tuple(
            Rows(
                ours,
                (groups * stride, *columns),
                group * stride + before * d,
                group * heads * d,
                (group + 1) * heads * d,
            )
            for group in range(groups)
        )
        yield Counterpart(f"{theirs}{letter}_proj.{kind}", (groups * heads * d, *columns), rows)


def _same(theirs: str, ours: str, shape: tuple[int, ...]) -> Counterpart:
    return Counterpart(theirs, shape, (Rows(ours, shape, 0, 0, shape[0]),))


def _table(shape: Shape, theirs: str, ours: str, padded: int, predicts: bool) -> Counterpart:
    v, h = shape.vocabulary_size, shape.hidden_size
    padding = Rows(ours, (padded, h), v, v, padded) if padded > v else None
    return Counterpart(theirs, (v, h), (Rows(ours, (padded, h), 0, 0, v),), padding, predicts)
