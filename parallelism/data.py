"""Tokenized text to batches: a pure function of (seed, step, island), the same for every layout.

In step s (from 0) island i of n takes sequences (s n + i) B to (s n + i + 1) B of the run's endless mixture,
B being its global batch: islands never see the same sequence in a step, and a resumed or re-laid-out run
sees what it would have seen. Making a run longer changes nothing of what came before.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clusters.segment import Segment
from parallelism.layout import Layout
from parallelism.megatron.dataset import Corpus, blend


def batch_range(step: int, island: int, islands: int, global_batch: int) -> range:
    """Numbers of the sequences that an island trains on in the step after `step` completed ones."""
    first = (step * islands + island) * global_batch
    return range(first, first + global_batch)


def rank_slices(layout: Layout, rank: int, global_batch: int, micro_batch: int) -> list[range]:
    """Positions in the global batch of each micro-batch of a rank; data-parallel ranks take turns."""
    dp = layout.coordinates(rank).dp
    stride = micro_batch * layout.dp
    return [range(s + dp * micro_batch, s + (dp + 1) * micro_batch) for s in range(0, global_batch, stride)]


class Batches:
    """The micro-batches of one rank of an island."""

    def __init__(self, segment: Segment, layout: Layout, rank: int) -> None:
        """Raises ValueError when the segment's data cannot be used."""
        self.segment = segment
        self._slices = rank_slices(layout, rank, segment.training.global_batch, segment.training.micro_batch)
        self._corpora = [_open(segment, position) for position in range(len(segment.data.prefixes))]
        weights = list(segment.data.weights) or [float(corpus.sequences) for corpus in self._corpora]
        if len(weights) != len(self._corpora) or min(weights) <= 0:
            raise ValueError(
                f"data.weights = {weights}: must be one positive number for each of data.prefixes"
            )
        total = segment.training.steps * segment.islands * segment.training.global_batch
        self._corpus, self._number = blend(weights, total)

    def prepare(self) -> None:
        """Make what is shared by the ranks. Rank 0 calls it, before any rank asks for a batch."""
        for position, corpus in enumerate(self._corpora):
            corpus.prepare(int((self._corpus == position).sum()))

    def micro_batches(self, step: int) -> list[torch.Tensor]:
        """For the step after `step` completed ones: each int64 [micro_batch, S + 1]."""
        training = self.segment.training
        numbers = batch_range(step, self.segment.island, self.segment.islands, training.global_batch)
        return [torch.stack([self._sequence(numbers[p]) for p in positions]) for positions in self._slices]

    def _sequence(self, number: int) -> torch.Tensor:
        position = int(self._corpus[number])
        tokens = self._corpora[position][int(self._number[number])]
        # a tensor-parallel embedding would turn a token that nobody holds into zeros, without a word
        if int(tokens.max()) >= self.segment.model.vocabulary_size:
            raise ValueError(
                f"data.prefixes: {self.segment.data.prefixes[position]} has token {int(tokens.max())}, "
                f"model.vocabulary_size is {self.segment.model.vocabulary_size}"
            )
        return tokens


def _open(segment: Segment, position: int) -> Corpus:
    scratch = Path(segment.scratch)
    return Corpus(
        scratch / segment.data.prefixes[position],
        scratch / "orders",
        segment.training.sequence_length,
        f"{segment.training.seed} {position}",  # not the path, which may differ from site to site
        segment.data.end_of_document,
    )
