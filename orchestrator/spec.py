"""What the user asks for: run.toml, read strictly. Every mistake is answered with one line."""

from __future__ import annotations

import json
import math
import re
import secrets
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from clusters.segment import Checkpointing, Data, ModelShape, Rounds, Start, Training, field_names
from orchestrator.models import preset_names, with_preset
from orchestrator.spec_errors import explain
from orchestrator.units import parse_count, parse_duration
from parallelism.layout import Layout

_STRICT = ConfigDict(extra="forbid")
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"

# Part of job names, file names and segment keys: no dots, no slashes.
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
Table = TypeVar("Table", Training, Data, Rounds, Checkpointing)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingTable(Training):
    """[training]: as a segment has it, but told in tokens over all islands instead of steps."""

    tokens: Annotated[int, BeforeValidator(parse_count)]
    steps: int = Field(init=False, default=0, exclude=True)
    seed: int = Field(init=False, default=0, exclude=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataTable(Data):
    """[data]: paths are relative to a site's scratch."""

    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RoundsTable(Rounds):
    """[rounds]: as a segment has it, the deadline written as a duration."""

    deadline_seconds: float = Field(default=600.0, alias="deadline")
    quantise: Literal["int8", "int4", "none"] = "int8"

    _read_deadline = field_validator("deadline_seconds", mode="before")(parse_duration)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointTable(Checkpointing):
    """[checkpoint]: as a segment has it, its times written as durations."""

    keep_every_seconds: float = Field(default=0.0, alias="keep_every")
    writer_timeout_seconds: float = Field(default=300.0, alias="writer_timeout")

    _read_times = field_validator("keep_every_seconds", "writer_timeout_seconds", mode="before")(
        parse_duration
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Island(Layout):
    """[[islands]]: where a part of the run trains, who pays, and how its ranks share the model."""

    site: Name
    allocation: str
    time_limit_seconds: float = Field(alias="time_limit")  # of one segment of its chain
    nodes: int | None = Field(default=None, ge=1)  # where none are named: as few as hold the ranks

    _read_time_limit = field_validator("time_limit_seconds", mode="before")(parse_duration)

    @property
    def layout(self) -> Layout:
        return Layout(**{axis.name: getattr(self, axis.name) for axis in fields(Layout)})


class RunSpec(BaseModel):
    """A whole run.toml. One that exists is consistent: its layouts fit its model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    seed: int = 1234
    model: ModelShape
    data: DataTable
    training: TrainingTable
    start: Start | None = None
    rounds: RoundsTable | None = None
    checkpoint: CheckpointTable
    islands: tuple[Island, ...]

    @field_validator("model", mode="before")
    @classmethod
    def _start_from_the_preset(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        own = with_preset(table)
        missing = [f.name for f in fields(ModelShape) if f.default is MISSING and f.name not in own]
        if missing and "preset" not in table:
            raise ValueError(f"lacks {', '.join(missing)}; or a preset: {', '.join(preset_names())}")
        return own

    @model_validator(mode="after")
    def _is_consistent(self) -> RunSpec:
        problems = list(_numbers(self)) or list(dict.fromkeys(_contradictions(self)))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def steps(self) -> int:
        """Of each island: enough for all tokens, rounded up to whole steps and whole rounds."""
        steps = -(-self.training.tokens // (self.training.tokens_per_step * len(self.islands)))
        whole = self.rounds.inner_steps if self.rounds else 1
        return -(-steps // whole) * whole

    def segment_training(self) -> Training:
        return _contract(Training, self.training, steps=self.steps, seed=self.seed)

    def segment_data(self) -> Data:
        return _contract(Data, self.data)

    def segment_checkpointing(self) -> Checkpointing:
        return _contract(Checkpointing, self.checkpoint)

    def segment_rounds(self) -> Rounds | None:
        return _contract(Rounds, self.rounds) if self.rounds else None


def load_run(path: Path) -> RunSpec:
    """Read a run.toml. Raises ValueError: one line per mistake, with file, key and what is allowed."""
    try:
        return parse_run(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: byte {error.start} is {error.reason}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def parse_run(text: str, where: str) -> RunSpec:
    """The run that a TOML text describes; `where` names it in messages. Raises ValueError as `load_run`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not TOML: {error}") from None
    try:
        # By way of JSON, where pydantic's strict mode takes a list for a tuple but never "4" for 4.
        return RunSpec.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        lines = explain(error, table, RunSpec)
        raise ValueError("\n".join(f"{where}: {line}" for line in lines)) from None


def new_run_id(name: str) -> str:
    """Unique: `<name>-<6 base32>`, one of 2**30 for each name."""
    return f"{name}-" + "".join(secrets.choice(_BASE32) for _ in range(6))


def _contract(cls: type[Table], table: Any, **given: int) -> Table:
    """The part of a user's table that a segment carries."""
    return cls(**{name: getattr(table, name) for name in field_names(cls)} | given)


# What numbers must be, where parallelism.layout does not say it. "inf" and "nan" are never allowed.
_ABOVE_ZERO = (math.ulp(0.0), math.inf, "above 0")
_NOT_NEGATIVE = (0.0, math.inf, "at least 0")
_BELOW_ONE = (0.0, 1.0, "at least 0 and below 1")
_ABOVE_ONE = (math.nextafter(1.0, 2.0), math.inf, "above 1")
_AT_LEAST_1 = (1.0, math.inf, "at least 1")
_RANGES = {
    "seed": _NOT_NEGATIVE,
    "model.rope_base": _ABOVE_ZERO,
    "model.norm_epsilon": _ABOVE_ZERO,
    "model.rope_factor": _ABOVE_ZERO,
    "model.rope_original_positions": _AT_LEAST_1,
    "model.rope_low_frequency": _ABOVE_ZERO,
    "model.rope_high_frequency": _ABOVE_ZERO,
    "model.experts": _NOT_NEGATIVE,
    "model.balance_loss": _NOT_NEGATIVE,
    "data.end_of_document": _NOT_NEGATIVE,
    "training.tokens": _AT_LEAST_1,
    "training.sequence_length": _AT_LEAST_1,
    "training.global_batch": _AT_LEAST_1,
    "training.learning_rate": _ABOVE_ZERO,
    "training.warmup_steps": _NOT_NEGATIVE,
    "training.final_learning_rate": _NOT_NEGATIVE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.adam_beta1": _BELOW_ONE,
    "training.adam_beta2": _BELOW_ONE,
    "training.clip_grad": _ABOVE_ZERO,
    "rounds.inner_steps": _AT_LEAST_1,
    "rounds.outer_learning_rate": _ABOVE_ZERO,
    "rounds.outer_momentum": _BELOW_ONE,
    "rounds.deadline_seconds": _ABOVE_ZERO,
    "rounds.max_open_rounds": _AT_LEAST_1,
    "rounds.max_norm_ratio": _ABOVE_ONE,
    "rounds.max_drift": _ABOVE_ZERO,
    "rounds.reset_every": _AT_LEAST_1,
    "checkpoint.every_steps": _AT_LEAST_1,
    "checkpoint.keep": (2.0, math.inf, "at least 2: the newest may be damaged"),
    "checkpoint.keep_every_seconds": _NOT_NEGATIVE,
    "checkpoint.milestone_steps": _NOT_NEGATIVE,
    "checkpoint.writer_timeout_seconds": _AT_LEAST_1,
}


def _numbers(spec: RunSpec) -> Iterator[str]:
    for key, (least, limit, words) in _RANGES.items():
        table, _, name = key.rpartition(".")
        holder = getattr(spec, table) if table else spec
        value = getattr(holder, name) if holder is not None else least
        if not least <= value < limit:
            yield f"{key.removesuffix('_seconds')} is {value}; it must be {words}"
    for island in spec.islands:
        if not 0 < island.time_limit_seconds < math.inf:
            yield f"islands.{island.site}.time_limit is {island.time_limit_seconds}; it must be above 0"


def _contradictions(spec: RunSpec) -> Iterator[str]:
    sites = [island.site for island in spec.islands]
    if not sites:
        yield "islands is empty; a run needs one [[islands]] table at least"
        return
    for site in dict.fromkeys(s for s in sites if sites.count(s) > 1):
        yield f"islands: site {site!r} appears {sites.count(site)} times; a site has one island of a run"
    if len(sites) > 1 and spec.rounds is None:
        yield f"rounds is missing; {len(sites)} islands need the table [rounds] to train one model"
    yield from _data(spec.data)
    if spec.checkpoint.fast and spec.checkpoint.fast[0] not in "/$":
        yield f"checkpoint.fast is {spec.checkpoint.fast!r}; it must begin with / or a $VARIABLE of the nodes"
    if spec.checkpoint.peers and not spec.checkpoint.fast:
        yield "checkpoint.peers needs checkpoint.fast, the nodes' directory for copies, such as /dev/shm"
    if spec.start:
        yield from _start(spec.start)
    training = spec.segment_training()
    if training.warmup_steps > training.steps:
        yield f"training.warmup_steps is {training.warmup_steps}; the run has only {training.steps} steps"
    for island in spec.islands:
        try:
            island.layout.validate(spec.model, training)
        except ValueError as error:
            yield str(error).replace("layout.", f"islands.{island.site}.")


def _data(data: DataTable) -> Iterator[str]:
    if not data.prefixes:
        yield "data.prefixes is empty; it must name one .bin/.idx pair at least"
    if data.weights and len(data.weights) != len(data.prefixes):
        prefixes = f"one for each of {len(data.prefixes)} prefixes, or none"
        yield f"data.weights has {len(data.weights)} numbers; {prefixes}"
    if not all(0 < weight < math.inf for weight in data.weights):
        yield f"data.weights is {list(data.weights)}; every weight must be above 0"
    for key, path in [("tokenizer", data.tokenizer or "x"), *(("prefixes", p) for p in data.prefixes)]:
        yield from _below_scratch(f"data.{key}", path)


def _start(start: Start) -> Iterator[str]:
    yield from _below_scratch("start.checkpoint", start.checkpoint)
    if not re.fullmatch("[0-9a-f]{64}", start.sha256):
        yield (
            f"start.sha256 is {start.sha256[:70]!r}; it must be the 64 digits of the checkpoint's manifest, "
            "as `eurotrain checkpoint show` prints them"
        )


def _below_scratch(key: str, path: str) -> Iterator[str]:
    if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        yield f"{key} has {path!r}; paths are relative to a site's scratch and stay below it"
