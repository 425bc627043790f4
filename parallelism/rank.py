"""One training process: `python -P -m parallelism.rank SEGMENT_DIR`, alone, under torchrun or a supervisor.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say which one. Exit codes: clusters/segment.py.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from clusters.events import COMPLETED, DRAINED, FAILED, STARVED, STEP, TRAINING_ENDED, TRAINING_READY
from clusters.paths import SegmentPaths
from clusters.segment import EXIT_BAD_INPUT, EXIT_COMPLETED, EXIT_DRAINED, EXIT_STARVED, Segment
from parallelism import device, start
from parallelism.checkpointing import Checkpoints, Progress
from parallelism.control import Control
from parallelism.data import Batches
from parallelism.exchange import Exchange, Refused
from parallelism.layout import Layout
from parallelism.megatron.trainer import Trainer
from parallelism.outer import Outer

EXIT_CODES = {COMPLETED: EXIT_COMPLETED, DRAINED: EXIT_DRAINED, STARVED: EXIT_STARVED}


def main(segment_dir: Path) -> int:
    """Train this rank's part of a segment to its end; the exit code.

    What would fail again in the same way has a code of its own, and one line at the end of the log.
    """
    try:
        return run(segment_dir)
    except (ValueError, FloatingPointError) as problem:
        traceback.print_exc()
        sys.stderr.write(f"eurotrain: {' '.join(str(problem).split())}\n")
        return EXIT_BAD_INPUT


def run(segment_dir: Path) -> int:
    """Train this rank's part of a segment to its end; the exit code.

    Raises ValueError, with one line for the user, when the segment, its data, its checkpoints or a closed
    round cannot be used, and FloatingPointError when the training has diverged. Nothing is saved then.
    """
    began = time.monotonic()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # 2 on one core: 5 times slower
    paths = SegmentPaths(segment_dir)
    segment = paths.load()
    layout = Layout.from_mapping(segment.layout)
    layout.validate(segment.model, segment.training)
    here = device.pick()
    device.join(here, layout.ranks)
    control = Control(paths, here)
    batches = Batches(segment, layout, control.rank)
    control.from_leader(batches.prepare)
    trainer = Trainer(segment, layout, here, batches)
    start.load(segment, control, trainer)
    outer = _outer(segment, trainer)
    exchange = Exchange(segment, control, trainer, outer) if outer else None
    checkpoints = Checkpoints(segment, control, trainer, outer)
    progress, path = checkpoints.restore()
    _tell_ready(control, segment, progress, path, began)
    try:
        outcome = train(segment, control, trainer, checkpoints, exchange, progress)
    except (Refused, FloatingPointError) as problem:  # on all ranks alike
        checkpoints.wait()  # for what is sound
        control.tell(TRAINING_ENDED, outcome=FAILED, step=progress.step, reason=str(problem))
        raise
    checkpoints.close()
    control.tell(TRAINING_ENDED, outcome=outcome, step=progress.step)
    dist.destroy_process_group()
    return EXIT_CODES[outcome]


def train(
    segment: Segment,
    control: Control,
    trainer: Trainer,
    checkpoints: Checkpoints,
    exchange: Exchange | None,
    progress: Progress,
) -> str:
    """Go on from `progress`, which is kept up to date, to the end of the run or of the segment; which."""
    if exchange and not progress.finished:
        exchange.catch_up(progress.step)
    while not progress.finished:
        in_time = True
        if exchange and exchange.due(progress.step) and not control.draining:
            in_time = exchange.meet(progress.step)
        trained = progress.step == segment.training.steps
        progress.finished = trained and not (exchange and exchange.due(progress.step))
        outcome = _outcome(progress.finished, control.draining, in_time)
        if outcome:
            checkpoints.finish(progress)
            return outcome
        if checkpoints.due(progress.step):
            checkpoints.save(progress)
        checkpoints.watch()
        if not trained:  # else it contributes again: the last round was closed without it
            tokens = _step(control, trainer, progress)
            if exchange:
                exchange.outer.tokens += tokens
    return COMPLETED


def _outcome(finished: bool, draining: bool, in_time: bool) -> str | None:
    """Why the segment ends here; None to go on."""
    if finished:
        return COMPLETED
    if draining:
        return DRAINED
    return None if in_time else STARVED


def _step(control: Control, trainer: Trainer, progress: Progress) -> int:
    """One step of the island; its tokens."""
    began = time.monotonic()
    result = trainer.step(progress.step)
    loss_sum, tokens = control.sum(result.loss_sum, result.tokens)
    loss, norm = loss_sum / tokens, result.grad_norm
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"diverged in step {progress.step + 1}: loss {loss}, gradient norm {norm}")
    progress.step += 1
    progress.tokens += int(tokens)
    facts = {"loss": loss, "grad_norm": norm, "learning_rate": result.learning_rate, "tokens": int(tokens)}
    control.tell(STEP, step=progress.step, **facts, seconds=time.monotonic() - began)
    return int(tokens)


def _outer(segment: Segment, trainer: Trainer) -> Outer | None:
    """To be made while the weights are the initial ones, which all islands share: they are round 0's base."""
    if segment.rounds is None:
        return None
    shards, owned = trainer.parameter_shards(), trainer.owned_parameter_shards()
    return Outer(shards, owned, segment.rounds, segment.run, segment.site)


def _tell_ready(
    control: Control, segment: Segment, progress: Progress, path: Path | None, began: float
) -> None:
    control.tell(
        TRAINING_READY,
        generation=int(os.environ.get("EUROTRAIN_GENERATION", "1")),
        step=progress.step,
        checkpoint=str(path) if path else None,
        parameters=segment.model.parameters,
        seconds=time.monotonic() - began,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="parallelism.rank")
    parser.add_argument("segment", type=Path, help="the segment's directory")
    sys.exit(main(parser.parse_args().segment))
