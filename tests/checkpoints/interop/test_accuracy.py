"""What quantising costs: nothing for the same weights, more for coarser ones, and by the definitions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints.interop.accuracy import measure
from checkpoints.interop.exporting import newest
from checkpoints.interop.huggingface import Export
from checkpoints.interop.importing import import_weights
from checkpoints.interop.shape import Shape
from checkpoints.reader import Reader
from tests.checkpoints.interop.models import logits, saved_model

TOKENS = torch.randint(0, 300, (70,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def work(tmp_path: Path) -> Export:
    saved_model(tmp_path / "theirs", "qwen3")
    import_weights(tmp_path / "theirs", tmp_path / "ours", 128)
    reader = Reader(newest(tmp_path / "ours"))
    return Export(reader, Shape.from_facts(reader.facts), "float32")


def rounded(work: Export, step: float) -> Iterator[tuple[str, torch.Tensor]]:
    for part in work.parts:
        values = work.tensor(part)
        yield part.theirs, (values / step).round() * step if step else values


def test_the_same_weights_cost_nothing(work: Export) -> None:
    cost = measure(work, rounded(work, 0), TOKENS, 32)
    assert cost["tokens"] == 31 + 31 + 5
    assert cost["perplexity"] == cost["perplexity_quantised"]
    assert (cost["mean_kl_nats"], cost["same_likeliest"]) == (0.0, 1.0)


def test_by_the_definitions(work: Export, tmp_path: Path) -> None:
    cost = measure(work, rounded(work, 0.1), TOKENS[:33], 64)
    model = saved_model(tmp_path / "again", "qwen3")
    p = logits(model, TOKENS[None, :32])[0].double().softmax(-1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter / 0.1).round() * 0.1)
    q = logits(model, TOKENS[None, :32])[0].double().softmax(-1)
    chosen = torch.arange(32), TOKENS[1:33]
    assert cost["perplexity"] == pytest.approx(float((-p[chosen].log()).mean().exp()), rel=1e-4)
    assert cost["perplexity_quantised"] == pytest.approx(float((-q[chosen].log()).mean().exp()), rel=1e-4)
    assert cost["mean_kl_nats"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)
    assert cost["same_likeliest"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))


def test_coarser_costs_more(work: Export) -> None:
    costs = [measure(work, rounded(work, step), TOKENS, 32)["mean_kl_nats"] for step in (0.001, 0.01, 0.1)]
    assert costs == sorted(costs)
    assert costs[0] < 1e-4 < costs[2]


def test_a_text_must_be_long_enough_and_of_these_tokens(work: Export) -> None:
    with pytest.raises(ValueError, match="has 15 tokens; 16 at least"):
        measure(work, [], TOKENS[:15], 32)
    with pytest.raises(ValueError, match="has token 300; the model has 300"):
        measure(work, [], torch.full((20,), 300), 32)
