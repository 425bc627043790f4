"""How one island's ranks share a model: sizes, coordinates, what fits. No torch.

Letters, as Megatron has them: tp tensor, pp pipeline, dp data, cp context, ep expert parallelism and
vpp virtual pipeline stages.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from clusters.segment import ModelShape, Training

# The vocabulary is padded to a multiple of this, whatever the layout, so that all islands of a run agree
# on every global shape. 512 = 128 (a full GEMM tile per rank) x 4; any power of two up to 512 can be tp.
VOCABULARY_MULTIPLE = 512

ROPE_SCALINGS = ("none", "linear", "llama3")

VALUE_BYTES = {"fp32": 4, "bf16": 2}  # by precision
_AXES = ("tp", "pp", "dp", "cp", "ep", "vpp")


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands along each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes of one island.

    Ranks are numbered in Megatron's order tp-cp-ep-dp-pp, tp fastest; expert parallelism reuses the
    ranks of the others and multiplies nothing, nor do virtual stages. The distributed optimizer (ZeRO-1:
    Rajbhandari et al., arXiv 1910.02054) cuts fp32 weights under bf16, Adam's moments and the outer state
    over the data-parallel ranks.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1
    distributed_optimizer: bool = False

    @classmethod
    def from_mapping(cls, sizes: Mapping[str, Any]) -> Layout:
        """The layout a segment or a user's table names. Raises ValueError for an unknown axis."""
        known = [f.name for f in fields(cls)]
        for name in sizes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"layout.{name}: no such axis{hint} (allowed: {', '.join(known)})")
        return cls(**sizes)

    def __str__(self) -> str:
        named = [f"{name.upper()}{size}" for name in _AXES if (size := getattr(self, name)) > 1]
        return " ".join(named + ["ZeRO-1"] * self.distributed_optimizer) or "1 rank"

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.ranks, f"rank {rank} of {self.ranks}"
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, at: Coordinates) -> int:
        """The rank at some coordinates: the inverse of `coordinates`."""
        return at.tp + self.tp * (at.cp + self.cp * (at.dp + self.dp * at.pp))

    def micro_batches(self, training: Training) -> int:
        """Micro-batches that one data-parallel rank works through in a step."""
        return training.global_batch // (training.micro_batch * self.dp)

    def validate(self, model: ModelShape, training: Training) -> None:
        """Raises ValueError, one line naming field, value and what is allowed, if this cannot train."""
        self.validate_model(model)
        _validate_training(training)
        # each of cp ranks holds two chunks of the sequence; sequence parallelism cuts them over tp ranks
        chunks = self.tp * (2 * self.cp if self.cp > 1 else 1)
        field = "layout.tp" if self.cp == 1 else "2 x layout.tp x layout.cp"
        _divides(field, chunks, "training.sequence_length", training.sequence_length)
        together = training.micro_batch * self.dp
        if training.global_batch % together:
            raise ValueError(
                f"training.global_batch = {training.global_batch}: must be a multiple of "
                f"training.micro_batch x layout.dp = {training.micro_batch} x {self.dp} = {together}"
            )
        if self.vpp > 1 and training.global_batch % (together * self.pp):
            # the interleaved schedule takes them in groups of pp (Narayanan et al., arXiv 2104.04473)
            raise ValueError(
                f"training.global_batch = {training.global_batch}: must be a multiple of "
                f"training.micro_batch x layout.dp x layout.pp = {together * self.pp} with virtual stages"
            )

    def validate_model(self, model: ModelShape) -> None:
        """Raises ValueError, as `validate`, if the model cannot be cut so."""
        _validate_sizes(self)
        _validate_model(model)
        _divides("layout.tp", self.tp, "model.attention_heads", model.attention_heads)
        _divides("layout.tp", self.tp, "model.query_groups", model.query_groups)
        _divides("layout.tp", self.tp, "model.ffn_hidden_size", model.ffn_hidden_size)
        _divides("layout.tp", self.tp, "the padded vocabulary", padded_vocabulary(model))
        _validate_experts(self, model)
        _divides("layout.pp", self.pp, "model.layers", model.layers)
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(
                f"layout.vpp = {self.vpp}: virtual stages need a pipeline (layout.pp of at least 2)"
            )
        _divides("layout.pp x layout.vpp", self.pp * self.vpp, "model.layers", model.layers)


def _validate_sizes(layout: Layout) -> None:
    for name in _AXES:
        _at_least_one(f"layout.{name}", getattr(layout, name))
    if not isinstance(layout.distributed_optimizer, bool):
        raise ValueError(
            f"layout.distributed_optimizer = {layout.distributed_optimizer!r}: must be true or false"
        )


def _validate_experts(layout: Layout, model: ModelShape) -> None:
    if model.experts == 0:
        if layout.ep > 1:
            raise ValueError(f"layout.ep = {layout.ep}: the model has no experts (allowed: 1)")
        return
    if layout.tp > 1 and layout.ep == 1:
        # megatron-core 0.16 would keep a copy of every expert per tensor-parallel rank, and never add up
        # their gradients: losses were 4e-3 off after 10 steps
        raise ValueError(f"layout.ep = 1: experts and layout.tp = {layout.tp} need at least 2")
    _divides("layout.ep", layout.ep, "model.experts", model.experts)
    together = layout.tp * layout.cp * layout.dp
    _divides("layout.ep", layout.ep, "layout.tp x layout.cp x layout.dp", together)


def _validate_model(model: ModelShape) -> None:
    for name in (
        "layers",
        "hidden_size",
        "ffn_hidden_size",
        "attention_heads",
        "query_groups",
        "vocabulary_size",
    ):
        _at_least_one(f"model.{name}", getattr(model, name))
    for name in ("kv_channels", "sliding_window"):
        if getattr(model, name) is not None:
            _at_least_one(f"model.{name}", getattr(model, name))
    if model.kv_channels is None:
        _divides("model.attention_heads", model.attention_heads, "model.hidden_size", model.hidden_size)
    _divides("model.query_groups", model.query_groups, "model.attention_heads", model.attention_heads)
    if model.head_dim % 2:
        field = "model.kv_channels" if model.kv_channels else "model.hidden_size / model.attention_heads"
        raise ValueError(f"{field} = {model.head_dim}: rotary positions need it even")
    if model.experts and not 1 <= model.experts_per_token <= model.experts:
        chosen = model.experts_per_token
        raise ValueError(f"model.experts_per_token = {chosen}: must be 1 to model.experts = {model.experts}")
    if model.rope_scaling not in ROPE_SCALINGS:
        allowed = ", ".join(ROPE_SCALINGS)
        raise ValueError(f"model.rope_scaling = {model.rope_scaling!r}: not known (allowed: {allowed})")
    if model.rope_low_frequency >= model.rope_high_frequency:
        low, high = model.rope_low_frequency, model.rope_high_frequency
        raise ValueError(
            f"model.rope_high_frequency = {high}: must be above model.rope_low_frequency = {low}"
        )


def _validate_training(training: Training) -> None:
    for name in ("steps", "sequence_length", "global_batch", "micro_batch"):
        _at_least_one(f"training.{name}", getattr(training, name))
    if training.precision not in VALUE_BYTES:
        allowed = ", ".join(VALUE_BYTES)
        raise ValueError(f"training.precision = {training.precision!r}: not known (allowed: {allowed})")


def _at_least_one(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} = {value!r}: must be a whole number of at least 1")


def _divides(field: str, value: int, whole_field: str, whole: int) -> None:
    if whole % value:
        allowed = ", ".join(str(n) for n in range(1, min(whole, 128) + 1) if whole % n == 0)
        raise ValueError(f"{field} = {value}: must divide {whole_field} = {whole} (allowed: {allowed})")


def padded_vocabulary(model: ModelShape) -> int:
    """Rows of the embedding: the vocabulary rounded up to VOCABULARY_MULTIPLE, the same in any layout."""
    return -(-model.vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
