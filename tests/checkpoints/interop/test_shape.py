"""Their tensors and ours cover each other, every element once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.interop.shape import Shape, counterparts
from clusters.segment import ModelShape

PLAIN = {
    "layers": 2, "hidden_size": 12, "ffn_hidden_size": 10, "attention_heads": 4, "query_groups": 2,
    "vocabulary_size": 7,
}  # fmt: skip


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return Shape(
        layers=draw(st.integers(1, 3)),
        hidden_size=2 * groups * per_group * draw(st.integers(1, 3)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        attention_heads=groups * per_group,
        query_groups=groups,
        vocabulary_size=draw(st.integers(1, 20)),
        kv_channels=draw(st.sampled_from([None, 2, 6])),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


@given(shapes(), st.integers(1, 8))
def test_every_row_has_one_place(shape: Shape, multiple: int) -> None:
    padded = -(-shape.vocabulary_size // multiple) * multiple
    covered: dict[str, set[int]] = defaultdict(set)
    sizes = {}
    for part in counterparts(shape, padded):
        assert [r.start for r in part.rows] == [0, *(r.stop for r in part.rows[:-1])], part.theirs
        assert part.rows[-1].stop == part.shape[0]
        for rows in (*part.rows, *([part.padding] if part.padding else [])):
            assert rows.global_shape[1:] == part.shape[1:]
            assert sizes.setdefault(rows.ours, rows.global_shape) == rows.global_shape
            places = set(range(rows.first, rows.first + rows.stop - rows.start))
            assert not covered[rows.ours] & places
            covered[rows.ours] |= places
    assert {name: len(rows) for name, rows in covered.items()} == {n: s[0] for n, s in sizes.items()}
    held = sum(prod(part.shape) for part in counterparts(shape, padded))
    tables = 1 if shape.tied_embeddings else 2
    extra = tables * (padded - shape.vocabulary_size) * shape.hidden_size
    assert sum(prod(size) for size in sizes.values()) == held + extra


def test_queries_keys_and_values_of_a_group_lie_together() -> None:
    parts = {part.theirs: part.rows for part in counterparts(Shape(**PLAIN), 8)}
    places = {
        letter: [rows.first for rows in parts[f"model.layers.1.self_attn.{letter}_proj.weight"]]
        for letter in "qkv"
    }
    assert places == {"q": [0, 12], "k": [6, 18], "v": [9, 21]}  # heads of 3: 2 x 3 of queries, 3, 3


def test_only_the_table_that_makes_logits_predicts() -> None:
    apart = [p.theirs for p in counterparts(Shape(**PLAIN), 8) if p.predicts]
    tied = [p.theirs for p in counterparts(Shape(**PLAIN, tied_embeddings=True), 8) if p.predicts]
    assert (apart, tied) == (["lm_head.weight"], ["model.embed_tokens.weight"])


def test_facts_of_another_kind_of_model_are_refused() -> None:
    dense = {**PLAIN, "experts": 0, "experts_per_token": 2, "balance_loss": 0.01, "tied_embeddings": True}
    assert Shape.from_facts({"model": dense}).tied_embeddings
    dense = asdict(ModelShape(**PLAIN))  # as a training writes it
    assert Shape.from_facts({"model": dense}) == Shape(**PLAIN)
    with pytest.raises(ValueError, match="a model with experts = 8 belongs to none of the families"):
        Shape.from_facts({"model": {**PLAIN, "experts": 8}})
    with pytest.raises(ValueError, match="does not tell the shape"):
        Shape.from_facts({})
