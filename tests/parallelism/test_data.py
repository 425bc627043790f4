"""Batches: a pure function of seed, step and island, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import Data, Segment
from parallelism.data import Batches, batch_range, rank_slices
from parallelism.layout import Layout
from parallelism.megatron.dataset import Corpus, blend
from tests.parallelism.samples import MODEL, TRAINING, segment, write_text

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2, dp=2), Layout(dp=4)]


def opened(given: Segment, layout: Layout = Layout(), rank: int = 0) -> Batches:  # noqa: B008 - frozen
    batches = Batches(given, layout, rank)
    batches.prepare()
    return batches


def global_batch(given: Segment, layout: Layout, step: int) -> torch.Tensor:
    """Put together from what the data-parallel ranks of the first stage read."""
    by_dp = [opened(given, layout, dp * layout.tp).micro_batches(step) for dp in range(layout.dp)]
    return torch.cat(list(chain.from_iterable(zip(*by_dp, strict=True))))


def rows(batch: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for row in batch}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_sees_the_same_batch(tmp_path: Path, layout: Layout) -> None:
    given = segment(tmp_path, layout)
    for step in (0, 5):
        torch.testing.assert_close(
            global_batch(given, layout, step), global_batch(given, Layout(), step), rtol=0, atol=0
        )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_that_share_a_stage_or_a_tensor_read_the_same(tmp_path: Path, layout: Layout) -> None:
    slices = [rank_slices(layout, rank, 8, 2) for rank in range(layout.ranks)]
    by_dp = {layout.coordinates(rank).dp: slices[rank] for rank in range(layout.ranks)}
    assert slices == [by_dp[layout.coordinates(rank).dp] for rank in range(layout.ranks)]
    positions = [p for dp in by_dp.values() for micro_batch in dp for p in micro_batch]
    assert sorted(positions) == list(range(8))


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 64))
def test_islands_share_out_each_step_and_leave_nothing_out(step: int, islands: int, batch: int) -> None:
    ranges = [batch_range(step, island, islands, batch) for island in range(islands)]
    assert list(chain(*ranges)) == list(range(step * islands * batch, (step + 1) * islands * batch))


def test_islands_see_different_sequences_in_a_step(tmp_path: Path) -> None:
    one, other = (segment(tmp_path, Layout(), island=(i, 2)) for i in (0, 1))
    for step in range(3):
        seen = [rows(global_batch(given, Layout(), step)) for given in (one, other)]
        assert not seen[0] & seen[1]


def test_an_epoch_holds_every_sequence_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    write_text(tmp_path / "text", vocabulary=60_000)  # no two sequences alike
    corpus = Corpus(tmp_path / "text", tmp_path / "orders", 16, "7", 0)
    corpus.prepare(2 * corpus.sequences)
    epochs = [
        [tuple(corpus[e * corpus.sequences + i].tolist()) for i in range(corpus.sequences)] for e in (0, 1)
    ]
    assert len(set(epochs[0])) == len(set(epochs[1])) == corpus.sequences > 100
    assert epochs[0] != epochs[1]


def test_a_longer_run_begins_like_a_shorter_one(tmp_path: Path) -> None:
    """Over several epochs of a mixture: the text lasts for 18 of the 200 steps."""
    write_text(tmp_path / "other", seed=1)
    data = Data(prefixes=("text", "other"), weights=(0.7, 0.3))
    short = segment(tmp_path, Layout(), data=data)
    long = replace(short, training=replace(TRAINING, steps=200))
    a, b = opened(short), opened(long)
    for step in range(TRAINING.steps):
        torch.testing.assert_close(a.micro_batches(step), b.micro_batches(step), rtol=0, atol=0)
    assert max(b._number) > 2 * b._corpora[0].sequences


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    given = segment(tmp_path, Layout())
    other = replace(given, training=replace(TRAINING, seed=8))
    assert rows(global_batch(given, Layout(), 0)) != rows(global_batch(other, Layout(), 0))


def test_labels_are_the_next_tokens_of_the_text(tmp_path: Path) -> None:
    """Within a document every token is followed by itself plus the document's stride."""
    for row in global_batch(segment(tmp_path, Layout()), Layout(), 0).tolist():
        assert len(row) == TRAINING.sequence_length + 1
        strides = [b - a for a, b in pairwise(row) if a and b]
        regular = sum(strides[i] == strides[i - 1] for i in range(1, len(strides)))
        assert regular >= len(strides) - 4  # it may reach over the end of a document, or of the vocabulary


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5), st.integers(1, 400), st.integers(0, 400))
def test_a_mixture_keeps_to_its_weights_and_begins_alike(weights: list[float], count: int, more: int) -> None:
    corpus, number = blend(weights, count)
    longer, _ = blend(weights, count + more)
    assert (longer[:count] == corpus).all()
    for position, weight in enumerate(weights):
        assert abs((corpus == position).sum() - count * weight / sum(weights)) <= len(weights)
        assert number[corpus == position].tolist() == list(range((corpus == position).sum()))


def test_weights_default_to_the_sizes_of_the_texts(tmp_path: Path) -> None:
    write_text(tmp_path / "big", documents=240, seed=1)
    batches = opened(segment(tmp_path, Layout(), data=Data(prefixes=("text", "big"))))
    assert 0.7 < (batches._corpus == 1).mean() < 0.9


def test_orders_are_made_once_and_appear_whole(tmp_path: Path) -> None:
    given = segment(tmp_path, Layout())
    opened(given)
    (order,) = (tmp_path / "orders").iterdir()
    made = {path: path.stat().st_mtime_ns for path in order.iterdir()}
    assert len(made) == 4
    opened(given)
    assert {path: path.stat().st_mtime_ns for path in order.iterdir()} == made


def test_two_islands_may_make_the_same_order_at_once(tmp_path: Path) -> None:
    given = segment(tmp_path, Layout())
    batches, late = Batches(given, Layout(), 0), Batches(given, Layout(), 0)
    batches.prepare()
    late._corpora[0]._make_order(0)  # it had looked before the other was done
    assert len(list((tmp_path / "orders").iterdir())) == 1
    torch.testing.assert_close(late.micro_batches(0), batches.micro_batches(0), rtol=0, atol=0)


def test_a_replaced_text_gets_orders_of_its_own(tmp_path: Path) -> None:
    given = segment(tmp_path, Layout())
    opened(given)
    write_text(tmp_path / "text", seed=1)
    opened(given).micro_batches(0)
    assert len(list((tmp_path / "orders").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Data(prefixes=("absent",))}, r"data\.prefixes: .*absent\.bin is not there"),
        (
            {"data": Data(prefixes=("text",), weights=(1.0, 2.0))},
            r"data\.weights = \[1\.0, 2\.0\]: must be one",
        ),
        (
            {"data": Data(prefixes=("text",), weights=(0.0,))},
            r"data\.weights = \[0\.0\]: must be one positive",
        ),
        (
            {"training": replace(TRAINING, sequence_length=4096)},
            r"data\.prefixes: .*text has \d+ tokens; a sequence",
        ),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(segment(tmp_path, Layout(), **changes))  # type: ignore[arg-type]


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    batches = opened(segment(tmp_path, Layout(), model=replace(MODEL, vocabulary_size=50)))
    with pytest.raises(ValueError, match=r"text has token \d+, model\.vocabulary_size is 50"):
        batches.micro_batches(0)
