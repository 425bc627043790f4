"""A small model, a text that it can learn, and segments to train it: for tests of the training process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from checkpoints.manifest import MANIFEST, load
from clusters.events import read_events
from clusters.paths import SegmentPaths, SitePaths, write_atomically
from clusters.segment import Checkpointing, Data, ModelShape, Rounds, Segment, Training
from parallelism import device
from parallelism.data import Batches
from parallelism.layout import Layout
from parallelism.megatron.trainer import StepResult, Trainer
from parallelism.rank import main

MODEL = ModelShape(
    layers=4, hidden_size=32, ffn_hidden_size=64, attention_heads=4, query_groups=2, vocabulary_size=300
)
TRAINING = Training(
    steps=8, sequence_length=16, global_batch=8, micro_batch=2, learning_rate=3e-3, warmup_steps=2, seed=7
)


def write_text(prefix: Path, documents: int = 60, seed: int = 0, vocabulary: int = 300) -> None:
    """Arithmetic sequences, each a document of 20 to 60 tokens that ends with token 0."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        first, stride, length = random.integers(1, vocabulary), random.integers(1, 5), random.integers(20, 60)
        tokens = np.append((first + stride * np.arange(length)) % (vocabulary - 1) + 1, 0)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def segment(
    scratch: Path,
    layout: Layout,
    *,
    model: ModelShape = MODEL,
    training: Training = TRAINING,
    island: tuple[int, int] = (0, 1),
    site: str = "a",
    every: int = 4,
    rounds: Rounds | None = None,
    **changes: Any,
) -> Segment:
    """A segment at `scratch`; its text is written when it is not there."""
    if not (scratch / "text.idx").exists():
        write_text(scratch / "text")
    layout.validate(model, training)
    return Segment(
        key=f"run-{site}-0",
        run="run",
        site=site,
        island=island[0],
        islands=island[1],
        sequence=0,
        scratch=str(scratch),
        layout=asdict(layout),
        model=model,
        training=training,
        data=changes.pop("data", Data(prefixes=("text",))),
        checkpointing=Checkpointing(every_steps=every, keep=changes.pop("keep", 2)),
        time_limit_seconds=600.0,
        units_per_hour=1.0,
        unit_cap=1.0,
        rounds=rounds,
        **changes,
    )


def written(given: Segment) -> SegmentPaths:
    """The segment's directory, with segment.json in it."""
    paths = SitePaths(Path(given.scratch)).segment(given.key)
    write_atomically(paths.segment, given.to_json())
    return paths


def told(paths: SegmentPaths, kind: str) -> list[dict[str, Any]]:
    """The ranks' events of one kind."""
    events, _ = read_events(paths.events / "ranks.jsonl")
    return [event for event in events if event["kind"] == kind]


def saved(given: Segment) -> list[Path]:
    """Committed checkpoints, oldest first."""
    directory = SitePaths(Path(given.scratch)).checkpoints(given.run, given.site)
    return sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))


def await_saved(given: Segment, count: int) -> None:
    """Until so many checkpoints have been committed: writers take their time."""
    deadline = time.monotonic() + 100
    while len(saved(given)) < count:
        assert time.monotonic() < deadline, f"{len(saved(given))} checkpoints, not {count}"
        time.sleep(0.01)


def contents(checkpoint: Path) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Checksums of all that a checkpoint holds: two are bitwise equal if these are."""
    return {(piece.name, piece.offset, piece.shape): piece.checksums for piece in load(checkpoint).pieces}


def flip(path: Path) -> None:
    """Change the first byte of a file: of a tensor, not of what is between them."""
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def trainer(given: Segment) -> Trainer:
    """This rank's part of a segment, formed and at its beginning."""
    layout = Layout.from_mapping(given.layout)
    here = device.pick()
    device.join(here, layout.ranks)
    batches = Batches(given, layout, dist.get_rank())
    if dist.get_rank() == 0:
        batches.prepare()
    dist.barrier()
    return Trainer(given, layout, here, batches)


def interrupted(segment_dir: Path, step: int, what: Callable[[], object]) -> int:
    """`main`, where `what` is done just before the step after `step` completed ones, on every rank."""
    original = Trainer.step

    def interrupting(trainer: Trainer, completed: int) -> StepResult:
        if completed == step:
            what()
        return original(trainer, completed)

    Trainer.step = interrupting  # type: ignore[method-assign]
    return main(segment_dir)
