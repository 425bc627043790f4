"""How one island's ranks share a model: sizes, coordinates, what fits, what it costs. No torch.

Letters, as Megatron has them: tp tensor, pp pipeline, dp data, cp context, ep expert parallelism and
vpp virtual pipeline stages.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from clusters.segment import ModelShape, Training

# The vocabulary is padded to a multiple of this, whatever the layout, so that all islands of a run agree
# on every global shape. 512 = 128 (a full GEMM tile per rank) x 4; any power of two up to 512 can be tp.
VOCABULARY_MULTIPLE = 512

# Resident memory of a rank that has imported torch and megatron-core and formed its groups: 480 MB on CPU;
# a CUDA context with its communication buffers takes about as much on the device.
PROCESS_BYTES = 480_000_000

ROPE_SCALINGS = ("none", "linear", "llama3")

_PRECISIONS = {"fp32": 4, "bf16": 2}  # bytes per value
_NOT_YET = {"cp": "context parallelism", "ep": "expert parallelism", "vpp": "virtual pipeline stages"}


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
    ranks of the others and multiplies nothing.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1

    @classmethod
    def from_mapping(cls, sizes: Mapping[str, int]) -> Layout:
        """The layout a segment or a user's table names. Raises ValueError for an unknown axis."""
        known = [f.name for f in fields(cls)]
        for name in sizes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"layout.{name}: no such axis{hint} (allowed: {', '.join(known)})")
        return cls(**sizes)

    def __str__(self) -> str:
        named = [f"{name.upper()}{size}" for name, size in asdict(self).items() if size > 1]
        return " ".join(named) or "1 rank"

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
        _validate_sizes(self)
        _validate_model(model)
        _validate_training(training)
        _divides("layout.tp", self.tp, "model.attention_heads", model.attention_heads)
        _divides("layout.tp", self.tp, "model.query_groups", model.query_groups)
        _divides("layout.tp", self.tp, "model.ffn_hidden_size", model.ffn_hidden_size)
        _divides("layout.tp", self.tp, "the padded vocabulary", padded_vocabulary(model))
        # sequence parallelism cuts the sequence over the tensor-parallel ranks
        _divides("layout.tp", self.tp, "training.sequence_length", training.sequence_length)
        _divides("layout.pp", self.pp, "model.layers", model.layers)
        together = training.micro_batch * self.dp
        if training.global_batch % together:
            raise ValueError(
                f"training.global_batch = {training.global_batch}: must be a multiple of "
                f"training.micro_batch x layout.dp = {training.micro_batch} x {self.dp} = {together}"
            )


def _validate_sizes(layout: Layout) -> None:
    for name, size in asdict(layout).items():
        _at_least_one(f"layout.{name}", size)
    for name, words in _NOT_YET.items():
        size = getattr(layout, name)
        if size != 1:
            raise ValueError(f"layout.{name} = {size}: {words} not supported yet (allowed: 1)")


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
    if training.precision not in _PRECISIONS:
        allowed = ", ".join(_PRECISIONS)
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


def layers_per_stage(model: ModelShape, layout: Layout) -> int:
    return model.layers // layout.pp


def stage_parameters(model: ModelShape, layout: Layout, stage: int) -> int:
    """Trainable values one rank of pipeline stage `stage` holds, the vocabulary's padding included.

    Weights are cut over tp; norms (2 per layer, 4 with qk_norm, 1 at the end) are whole on every rank.
    """
    h, d = model.hidden_size, model.head_dim
    cut = h * d * (2 * model.attention_heads + 2 * model.query_groups) + 3 * h * model.ffn_hidden_size
    cut += model.qkv_bias * d * (model.attention_heads + 2 * model.query_groups)
    whole = 2 * h + model.qk_norm * 2 * d
    values = layers_per_stage(model, layout) * (cut // layout.tp + whole)
    first, last = stage == 0, stage == layout.pp - 1
    tables = first + last - (first and last and model.tied_embeddings)
    return values + tables * padded_vocabulary(model) * h // layout.tp + last * h


def memory_per_rank(model: ModelShape, training: Training, layout: Layout, *, rounds: bool = False) -> int:
    """Estimated bytes of the fullest rank: weights, gradients, Adam, outer state, activations, process.

    Per value of the model (bytes): fp32 weight 4 and gradient 4, or bf16 weight 2 with an fp32 gradient
    4 and an fp32 master 4; Adam's two moments 8; with rounds the outer base 4, momentum 4 and one
    difference in the making 4. Activations take half as much again as what is kept of them, for the
    backward pass's temporaries and for what allocators do not give back. Resident memory of 16M parameters
    on CPU, in 1 rank, TP2 and PP2, was between 1 % less and 8 % more than this.
    """
    per_value = (8 if training.precision == "fp32" else 10) + 8 + (12 if rounds else 0)
    fullest = max(
        stage_parameters(model, layout, stage) * per_value
        + activation_bytes(model, training, layout, stage) * 3 // 2
        for stage in range(layout.pp)
    )
    return fullest + PROCESS_BYTES


def activation_bytes(model: ModelShape, training: Training, layout: Layout, stage: int) -> int:
    """Bytes kept for the backward pass at the peak of the 1F1B schedule, without recomputation.

    Counted as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
    (arXiv 2205.05198, section 4), for this model: RMSNorm and SwiGLU, no dropout, and an attention that
    keeps no [s, s] scores. Values per token and layer, with sequence parallelism all divided by tp: of two
    norms the input, the normalised and the output 6h; q, k and v before rotation a + 2g and q and k after
    it a + g, where a is the width of all heads and g of all key groups; the attention's output a; SwiGLU's
    two halves, one of them copied, silu of the other and the product 5f. Torch's hooks for saved tensors
    count 2 % more. Stage i of p holds p - i micro-batches at once. The last stage also holds one
    micro-batch's logits in the compute type and twice in fp32.
    """
    value = _PRECISIONS[training.precision]
    q, kv = model.attention_heads * model.head_dim, model.query_groups * model.head_dim
    tokens = training.micro_batch * training.sequence_length
    per_token = 6 * model.hidden_size + 3 * q + 3 * kv + 5 * model.ffn_hidden_size
    layer = tokens * per_token * value // layout.tp
    in_flight = min(layout.pp - stage, layout.micro_batches(training))
    kept = in_flight * layers_per_stage(model, layout) * layer
    if stage == layout.pp - 1:
        kept += tokens * padded_vocabulary(model) * (value + 8) // layout.tp
    return kept


def flops_per_token(model: ModelShape, sequence_length: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    6N + 12 L H Q T: Chowdhery et al., "PaLM" (arXiv 2204.02311, appendix B), which grants no discount
    for causality; N leaves out the lookup in the input embedding, which multiplies nothing.
    """
    lookup = 0 if model.tied_embeddings else model.vocabulary_size * model.hidden_size
    width = model.attention_heads * model.head_dim
    return 6 * (model.parameters - lookup) + 12 * model.layers * width * sequence_length
