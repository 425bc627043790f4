"""What quantising costs, measured on a text: the quantised file's own weights beside the exact ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from checkpoints.interop.families import config_of
from checkpoints.interop.huggingface import Export

Weights = Iterable[tuple[str, torch.Tensor]]
LEAST = 16  # tokens: fewer would be a figure without meaning


def measure(work: Export, quantised: Weights, tokens: torch.Tensor, length: int) -> dict[str, float]:
    """Perplexity before and after, how far predictions moved, how often the likeliest token is the same.

    `tokens` int64 [N] are read in sequences of `length` at most; transformers computes, in fp32. The exact
    predictions of all tokens are kept meanwhile: N x vocabulary x 4 bytes. Raises ValueError for a text that
    is too short or of other tokens.
    """
    if len(tokens) < LEAST:
        raise ValueError(f"the text has {len(tokens)} tokens; {LEAST} at least say how accurate this is")
    if int(tokens.max()) >= work.shape.vocabulary_size or int(tokens.min()) < 0:
        raise ValueError(
            f"the text has token {int(tokens.max())}; the model has {work.shape.vocabulary_size}"
        )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(work.shape, "float32", length)))
    model = model.to(torch.float32).eval()
    sequences = [part for part in torch.split(tokens, length) if len(part) > 1]
    _fill(model, ((part.theirs, work.tensor(part)) for part in work.parts))
    exact = list(_predictions(model, sequences))
    _fill(model, quantised)
    return _compare(exact, _predictions(model, sequences), sequences)


def _compare(
    exact: list[torch.Tensor], rounded: Iterator[torch.Tensor], sequences: list[torch.Tensor]
) -> dict[str, float]:
    count, before, after, moved, same = 0, 0.0, 0.0, 0.0, 0
    for p, q, tokens in zip(exact, rounded, sequences, strict=True):
        labels = tokens[1:]
        count += len(labels)
        before += float(F.nll_loss(p, labels, reduction="sum"))
        after += float(F.nll_loss(q, labels, reduction="sum"))
        moved += float(F.kl_div(q, p, reduction="sum", log_target=True))
        same += int((p.argmax(1) == q.argmax(1)).sum())
    return {
        "tokens": count,
        "perplexity": math.exp(before / count),
        "perplexity_quantised": math.exp(after / count),
        "mean_kl_nats": moved / count,
        "same_likeliest": same / count,
    }


@torch.no_grad()
def _fill(model: PreTrainedModel, weights: Weights) -> None:
    parameters = dict(model.named_parameters())
    for name, values in weights:
        parameters[name].copy_(values)


@torch.no_grad()
def _predictions(model: PreTrainedModel, sequences: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Of each sequence, fp32 [N - 1, V]: the logarithm of every next token's probability."""
    for tokens in sequences:
        yield F.log_softmax(model(tokens[None, :-1]).logits[0].to(torch.float32), dim=-1)
