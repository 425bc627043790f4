"""A segment reads back as it was written, and what is none is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import (
    Checkpointing,
    Data,
    ModelShape,
    Rounds,
    Segment,
    Training,
    field_names,
)

words = st.text(max_size=5)
finite = st.floats(0, 1e9)
segments = st.builds(
    Segment,
    key=words,
    run=words,
    site=words,
    training=st.builds(Training, learning_rate=finite, seed=st.integers(0)),
    time_limit_seconds=finite,
    units_per_hour=finite,
    unit_cap=finite,
    layout=st.dictionaries(st.sampled_from(["tp", "pp", "dp"]), st.integers(1)),
    data=st.builds(
        Data,
        prefixes=st.lists(words, max_size=3).map(tuple),
        weights=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    ),
    rounds=st.none() | st.builds(Rounds, inner_steps=st.integers(1)),
)


@given(segments)
def test_reads_back_as_written(segment: Segment) -> None:
    again = Segment.from_json(segment.to_json())
    assert again == segment
    assert again.to_json() == segment.to_json()


def test_parts_are_read_as_what_they_are(segment: Segment) -> None:
    again = Segment.from_json(replace(segment, rounds=Rounds(5)).to_json())
    parts = (again.model, again.training, again.data, again.checkpointing, again.rounds)
    assert [type(part) for part in parts] == [ModelShape, Training, Data, Checkpointing, Rounds]
    assert isinstance(again.data.prefixes, tuple)
    assert isinstance(again.data.weights, tuple)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"key": ...}, "key"),
        ({"model": ...}, "model"),
        ({"data": {"prefixes": ["x"]}}, "weights"),
        ({"colour": 1}, "colour"),
        ({"training": {"stpes": 1}}, "stpes"),
        ({"rounds": {"colour": 1}}, "colour"),
        ({"checkpointing": 5}, "mapping"),
        ({"data": []}, "list"),
    ],
    ids=lambda value: json.dumps(value, default=str),
)
def test_what_is_no_segment_is_named(segment: Segment, change: dict[str, object], why: str) -> None:
    raw = {**json.loads(segment.to_json()), **change}
    text = json.dumps({key: value for key, value in raw.items() if value is not ...})
    with pytest.raises(ValueError, match=f"^not a segment of this version of eurotrain: .*{why}"):
        Segment.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"segment"'])
def test_what_is_no_object_is_no_segment(text: str) -> None:
    with pytest.raises(ValueError, match="not a segment of this version"):
        Segment.from_json(text)


def test_parameters_of_a_published_model() -> None:
    """Llama 3.2 1B and Llama 3.1 8B, as their checkpoints have them."""
    small = ModelShape(16, 2048, 8192, 32, 8, 128256, tied_embeddings=True)
    large = ModelShape(32, 4096, 14336, 32, 8, 128256)
    assert (small.parameters, small.head_dim) == (1_235_814_400, 64)
    assert large.parameters == 8_030_261_248


def test_tokens_of_a_step() -> None:
    assert Training(10, 32, 4, 2, 1e-3).tokens_per_step == 128


def test_names_that_a_user_may_write() -> None:
    assert field_names(Checkpointing) == ["every_steps", "keep"]
