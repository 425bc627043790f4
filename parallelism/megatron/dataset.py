"""One tokenized text as an endless, shuffled row of sequences."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from clusters.paths import sync_directory


class Corpus:
    """Sequences 0, 1, 2, ... of a `.bin`/`.idx` pair: epoch after epoch, each in an order of its own.

    Each epoch is one GPTDataset, so that sequence n is the same however long the run: GPTDataset would
    shuffle several epochs together, and a run made longer would see other sequences from the first step on.
    """

    def __init__(self, prefix: Path, cache: Path, sequence_length: int, seed: str, separator: int) -> None:
        """`cache` is where the orders of the epochs lie. Raises ValueError for a text that cannot be used."""
        for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
            if not path.is_file():
                raise ValueError(f"data.prefixes: {path} is not there")
        self.prefix, self.cache, self.seed = prefix, cache, seed
        self.sequence_length = sequence_length
        self.separator = separator
        self._text = IndexedDataset(str(prefix))
        tokens = int(self._text.sequence_lengths.sum(dtype=np.int64))
        self.sequences = (tokens - 1) // sequence_length  # per epoch; a label follows the last token
        if self.sequences < 1:
            raise ValueError(
                f"data.prefixes: {prefix} has {tokens} tokens; a sequence takes {sequence_length + 1}"
            )
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)  # a batch may reach from one epoch into the next

    def prepare(self, sequences: int) -> None:
        """Make the orders of the epochs that the first `sequences` need. Rank 0 calls it before all read."""
        for epoch in range(-(-sequences // self.sequences)):
            if not self._order(epoch).exists():
                self._make_order(epoch)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Sequence `number`: int64 [S + 1], where each token's label is the next."""
        epoch, index = divmod(number, self.sequences)
        sample = self._epoch(epoch)[index]
        return torch.cat([sample["tokens"], sample["labels"][-1:]])

    def _open_epoch(self, epoch: int) -> GPTDataset:
        return self._build(epoch, self._order(epoch))

    def _make_order(self, epoch: int) -> None:
        """Whole or not at all: another island at this site, or a killed rank, may be at it as well."""
        order = self._order(epoch)
        attempt = order.with_name(f".{order.name}.{os.getpid()}.tmp")
        shutil.rmtree(attempt, ignore_errors=True)
        self._build(epoch, attempt)
        for path in attempt.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        try:
            attempt.rename(order)
        except OSError:  # it is there by now, and the same
            shutil.rmtree(attempt)
        sync_directory(order.parent)

    def _build(self, epoch: int, order: Path) -> GPTDataset:
        """Reads the order that lies in `order`; makes it, on rank 0 alone, where there is none."""
        config = GPTDatasetConfig(
            random_seed=_hash32(f"{self.seed} {epoch}"),
            sequence_length=self.sequence_length,
            blend=([str(self.prefix)], None),
            split="1",
            path_to_cache=str(order),
            tokenizer=_Separator(self.separator),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(self._text), dtype=np.int32)
        return GPTDataset(self._text, str(self.prefix), documents, None, Split.train, config)

    def _order(self, epoch: int) -> Path:
        """Named by all that it depends on, the text's size and age included: texts get replaced."""
        index = Path(f"{self.prefix}.idx").stat()
        facts = [str(self.prefix), index.st_size, index.st_mtime_ns, self.sequence_length, self.seed, epoch]
        return self.cache / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class _Separator:
    """All that GPTDataset asks of a tokenizer: what ends a document, and that nothing pads."""

    vocab_size = None
    pad = -1

    def __init__(self, eod: int) -> None:
        self.eod = eod
        self.unique_identifiers = {"eod": eod}


def blend(weights: list[float], count: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """For sequences 0 to `count` of a mixture: which corpus each comes from, and its number there.

    Always the corpus that lags most behind its weight, so that a longer mixture begins like a shorter one.
    """
    corpus, number = np.zeros(count, dtype=np.int16), np.zeros(count, dtype=np.int64)
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    helpers.build_blending_indices(corpus, number, shares, len(weights), count, False)
    return corpus, number


def _hash32(text: str) -> int:
    """numpy's RandomState takes seeds of 32 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
