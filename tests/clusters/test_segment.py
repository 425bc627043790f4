"""A segment reads back as it was written, and what is none is named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import (
    Checkpointing,
    Data,
    ModelShape,
    Rounds,
    Segment,
    Start,
    Training,
    field_names,
)

words = st.text(max_size=5)


def any_of(cls: type, **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Instances with any values, "not a number" aside: it equals nothing, not even itself."""
    numbers = {field.name: st.floats(0, 1e9) for field in fields(cls) if field.type == "float"}
    return st.builds(cls, **{**numbers, **given})


segments = any_of(
    Segment,
    key=words,
    model=any_of(ModelShape),
    training=any_of(Training, precision=words),
    data=any_of(
        Data,
        prefixes=st.lists(words, max_size=3).map(tuple),
        weights=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    ),
    checkpointing=any_of(Checkpointing),
    rounds=st.none() | any_of(Rounds),
    start=st.none() | any_of(Start),
    layout=st.dictionaries(st.sampled_from(["tp", "pp", "dp"]), st.integers(1)),
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
        ({"start": {"checkpoint": "x"}}, "sha256"),
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
    assert field_names(Checkpointing) == [
        "every_steps",
        "keep",
        "keep_every_seconds",
        "milestone_steps",
        "writer_timeout_seconds",
        "fast",
        "peers",
    ]
