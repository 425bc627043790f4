"""What a site is told to run: one segment of an island, with everything its ranks need to know.

Standard library only, and Python 3.9: this file travels to sites with an old interpreter.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Mapping  # noqa: UP035 - Python 3.9 at the sites

# How a rank ends. Anything else is a failure, and the supervisor replaces all ranks of the island.
EXIT_COMPLETED = 0
EXIT_DRAINED = 80  # asked to stop: checkpoint saved
EXIT_STARVED = 81  # no closed round within the limit: checkpoint saved
EXIT_BAD_INPUT = 82  # its input or the training itself is bad: whoever tries again fails alike

_STRICT = {"extra": "forbid"}  # pydantic reads this where a user's file is validated


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention; with experts, like Mixtral."""

    __pydantic_config__ = _STRICT

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    attention_heads: int
    query_groups: int
    vocabulary_size: int
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    kv_channels: int | None = None  # width of a head; None: hidden_size / attention_heads
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # RMSNorm of every query's and key's head before rotation: Qwen 3
    sliding_window: int | None = None  # a token attends to so many, itself included: Mistral 7B
    rope_scaling: str = "none"  # or "linear", "llama3"
    rope_factor: float = 1.0  # by how much positions are stretched
    # of "llama3" alone: wavelengths above original / low are stretched, those below original / high are not
    rope_original_positions: int = 8192
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    experts: int = 0  # in every layer, each of ffn_hidden_size (Mixtral: arXiv 2401.04088); 0: a dense model
    experts_per_token: int = 2
    balance_loss: float = 0.01  # weight of the loss that spreads tokens evenly (Switch: arXiv 2101.03961)

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.attention_heads

    @property
    def parameters(self) -> int:
        """Number of trainable values, the vocabulary's padding not counted."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Those that work on a token."""
        return self._parameters(min(self.experts, self.experts_per_token))

    def _parameters(self, experts: int) -> int:
        attention = self.hidden_size * self.head_dim * (2 * self.attention_heads + 2 * self.query_groups)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size * (experts or 1)
        layer += 2 * self.hidden_size + self.experts * self.hidden_size  # norms, router
        layer += self.qkv_bias * self.head_dim * (self.attention_heads + 2 * self.query_groups)
        layer += self.qk_norm * 2 * self.head_dim
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.layers * layer + embeddings + self.hidden_size


@dataclass(frozen=True)
class Training:
    """One island's optimisation. Batches are counted in sequences, per island and step."""

    __pydantic_config__ = _STRICT

    steps: int
    sequence_length: int
    global_batch: int
    micro_batch: int
    learning_rate: float
    warmup_steps: int = 0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    precision: str = "fp32"  # or "bf16"
    seed: int = 1234

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length


@dataclass(frozen=True)
class Data:
    """Tokenized text: prefixes of Megatron `.bin`/`.idx` pairs, relative to scratch, with their weights."""

    __pydantic_config__ = _STRICT

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] = ()
    end_of_document: int = 0


@dataclass(frozen=True)
class Start:
    """Weights to begin with instead of random ones: an imported model, or one that another run trained."""

    __pydantic_config__ = _STRICT

    checkpoint: str  # it, or a directory of checkpoints, relative to scratch
    sha256: str  # of its manifest.json: the same weights at every site, or none


@dataclass(frozen=True)
class Rounds:
    """The outer optimisation across sites (DiLoCo: Douillard et al., arXiv 2311.08105)."""

    __pydantic_config__ = _STRICT

    inner_steps: int
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    deadline_seconds: float = 600.0  # from an island's update until it goes on without a closed round
    max_open_rounds: int = 2  # so many intervals without a closed round: checkpoint and exit
    quantise: str = "int8"  # what is sent of a difference: "int8", "int4", or "none" for fp32
    max_norm_ratio: float = 10.0  # to the median of earlier updates' norms; above, an update is refused
    max_drift: float = 1e-4  # relative, between two islands' bases; above, they are reset
    reset_every: int = 100  # rounds from one reset of all bases to one island's to the next


@dataclass(frozen=True)
class Checkpointing:
    __pydantic_config__ = _STRICT

    every_steps: int
    keep: int = 3  # the newest, at least 2
    keep_every_seconds: float = 0.0  # and for good the first of every so many; 0: none
    milestone_steps: int = 0  # and for good those at multiples; 0: none
    writer_timeout_seconds: float = 300.0  # without a sign of it, a writer is replaced
    fast: str = ""  # a directory of each node, or a $VARIABLE that names it: the newest are kept there, too
    peers: bool = False  # and on another node of the island, so that they outlive the node itself


@dataclass(frozen=True)
class Segment:
    """One job of an island's chain: all that the site needs to know to run it."""

    key: str
    run: str
    site: str
    island: int  # index of this island among the run's islands
    islands: int
    sequence: int  # index of this segment in the island's chain
    scratch: str
    layout: Mapping[str, Any]  # fields of parallelism.layout.Layout
    model: ModelShape
    training: Training
    data: Data
    checkpointing: Checkpointing
    time_limit_seconds: float
    units_per_hour: float  # what the whole allocation of this segment burns
    unit_cap: float  # the segment drains when it has burnt so much, controller or not
    drain_seconds: float = 60.0  # how long before a limit the drain begins
    max_restarts: int = 3  # replacements of the ranks without a new checkpoint in between
    rounds: Rounds | None = None
    start: Start | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Segment:
        """Raises ValueError, naming the field, when the text is not a segment of this version."""
        try:
            raw = json.loads(text)
            data = {**raw["data"], "prefixes": tuple(raw["data"]["prefixes"])}
            parts: dict[str, Any] = {
                "model": ModelShape(**raw["model"]),
                "training": Training(**raw["training"]),
                "data": Data(**{**data, "weights": tuple(data["weights"])}),
                "checkpointing": Checkpointing(**raw["checkpointing"]),
                "rounds": Rounds(**raw["rounds"]) if raw.get("rounds") else None,
                "start": Start(**raw["start"]) if raw.get("start") else None,
            }
            return cls(**{**raw, **parts})
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a segment of this version of eurotrain: {error}") from error


def field_names(cls: type) -> list[str]:
    """Names a user may write in a table that becomes `cls`."""
    return [f.name for f in fields(cls)]
