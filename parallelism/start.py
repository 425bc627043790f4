"""The weights a run begins with where they are not random: an imported model, or what another run trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints.attempts import by_sha256, candidates
from checkpoints.manifest import Damaged
from checkpoints.reader import Missing, Reader
from clusters.paths import SitePaths
from clusters.segment import ModelShape, Segment, Start
from parallelism.control import Control
from parallelism.megatron.trainer import Trainer

# What may differ between the model that was saved and the one that goes on: no weight depends on it.
_FREE = {
    "norm_epsilon", "sliding_window", "rope_base", "rope_scaling", "rope_factor", "rope_original_positions",
    "rope_low_frequency", "rope_high_frequency", "balance_loss",
}  # fmt: skip


def load(segment: Segment, control: Control, trainer: Trainer) -> None:
    """Replace the random weights by those of `segment.start`, unless there is a checkpoint to go on from.

    Called by all ranks. The optimizer begins afresh. Raises ValueError, one line, when the weights are not
    there, not those that were named, damaged, or another model's.
    """
    own = SitePaths(Path(segment.scratch)).checkpoints(segment.run, segment.site)
    if segment.start is None or control.from_leader(lambda: bool(candidates(own))):
        return
    named = segment.start
    path = control.from_leader(lambda: find(Path(segment.scratch), named))
    problem = control.first_problem(_read(path, segment.model, trainer))
    if problem:
        raise ValueError(f"start.checkpoint: {problem}")
    trainer.reload()


def find(scratch: Path, start: Start) -> Path:
    """The checkpoint whose manifest has the hash. Raises ValueError when it is not there."""
    try:
        return by_sha256(scratch / start.checkpoint, start.sha256)
    except ValueError as error:
        raise ValueError(f"start.checkpoint: {error}") from None


def _read(path: Path, model: ModelShape, trainer: Trainer) -> str | None:
    """Fill this rank's weights; what is wrong, if something is."""
    try:
        reader = Reader(path)
        _check_same(path, reader.facts.get("model"), model)
        for shard in trainer.parameter_shards():
            reader.read(shard)
    except (Damaged, Missing, ValueError) as problem:
        return str(problem)
    return None


def _check_same(path: Path, found: Any, model: ModelShape) -> None:
    """A tensor too few is missed when it is read; one too many would silently be left out."""
    ours = {**asdict(model), "kv_channels": model.head_dim}
    theirs = {**asdict(ModelShape(**found)), "kv_channels": ModelShape(**found).head_dim}
    for name, value in ours.items():
        if name not in _FREE and theirs[name] != value:
            raise ValueError(f"{path}: its model has {name} = {theirs[name]}, this run's {value}")
