"""Runs that begin with an open model: the same logits as transformers', and every mistake told."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from checkpoints import manifest as form
from checkpoints.interop.exporting import main as exporting
from checkpoints.interop.importing import import_weights
from checkpoints.interop.shape import Shape
from checkpoints.reader import Reader, Shard
from clusters.segment import EXIT_COMPLETED, EXIT_DRAINED, ModelShape, Rounds, Segment, Start
from parallelism import device, start
from parallelism.control import Control
from parallelism.data import Batches
from parallelism.layout import VOCABULARY_MULTIPLE, Layout
from parallelism.megatron.trainer import Trainer, _bare
from parallelism.rank import main
from tests.checkpoints.interop.models import FAMILIES, loaded_model, logits, saved_model
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import TRAINING, flip, interrupted, saved, segment, written

pytestmark = pytest.mark.ranks

TOKENS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(5))


def imported(scratch: Path, family: str) -> tuple[Any, Start, ModelShape]:
    """A model of transformers' and, at `scratch`, what a run needs to start from it."""
    theirs = saved_model(scratch / "theirs", family)
    import_weights(scratch / "theirs", scratch / "models" / family, VOCABULARY_MULTIPLE)
    (path,) = (scratch / "models" / family).glob("step-*")
    manifest = form.load(path)
    shape = vars(Shape.from_facts(manifest.facts))
    return theirs, Start(f"models/{family}", manifest.sha256), ModelShape(**shape)


def started(given: Segment) -> Trainer:
    layout = Layout.from_mapping(given.layout)
    here = device.pick()
    device.join(here, layout.ranks)
    control = Control(written(given), here)
    batches = Batches(given, layout, control.rank)
    control.from_leader(batches.prepare)
    trainer = Trainer(given, layout, here, batches)
    start.load(given, control, trainer)
    return trainer


def our_logits(given: Segment) -> torch.Tensor:
    """Of TOKENS, by the model a segment starts from, all ranks' parts of the vocabulary together."""
    trainer = started(given)
    with torch.no_grad():
        part = _bare(trainer.chunks[0]).eval()(TOKENS, None, None)
        whole = gather_from_tensor_model_parallel_region(part, trainer.groups.tp)
    dist.destroy_process_group()
    return whole[..., : given.model.vocabulary_size]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_here_what_it_computes_there(ranks: Ranks, tmp_path: Path, family: str) -> None:
    theirs, begin, model = imported(tmp_path, family)
    expected = logits(theirs, TOKENS)
    assert expected.std() > 0.5  # or agreement would mean little
    for layout in (Layout(), Layout(tp=2)):
        given = segment(tmp_path, layout, model=model, start=begin)
        for found in ranks.run(layout.ranks, partial(our_logits, given)):
            assert (found - expected).abs().max() < 2e-5


def test_training_goes_on_from_it_and_goes_out_again(ranks: Ranks, tmp_path: Path) -> None:
    """Started, trained in TP2, exported, loaded by transformers: still the same logits."""
    theirs, begin, model = imported(tmp_path, "qwen3")
    training = replace(TRAINING, steps=3, learning_rate=1e-3, warmup_steps=0)
    given = segment(tmp_path, Layout(tp=2), model=model, training=training, start=begin)
    assert ranks.run(2, partial(main, written(given).root)) == [EXIT_COMPLETED] * 2
    (last,) = saved(given)
    assert exporting(["--format=hf", str(last), str(tmp_path / "out")]) == 0
    out = loaded_model(tmp_path / "out")
    assert out.config.max_position_embeddings == training.sequence_length
    moved = logits(out, TOKENS)
    assert (moved - logits(theirs, TOKENS)).abs().mean() > 0.01
    place = str(last.relative_to(tmp_path))
    again = replace(given, run="again", key="again-a-0", start=Start(place, form.load(last).sha256))
    for found in ranks.run(2, partial(our_logits, again)):
        assert (found - moved).abs().max() < 2e-5


def drained_after(given: Segment, step: int) -> int:
    return interrupted(written(given).root, step, written(given).drain.touch)


def test_rounds_count_from_it_and_a_resumed_run_needs_it_no_more(ranks: Ranks, tmp_path: Path) -> None:
    """Else the first update would be the whole difference between the open model and random weights."""
    _, begin, model = imported(tmp_path, "llama")
    given = segment(
        tmp_path, Layout(tp=2), model=model, start=begin, rounds=Rounds(inner_steps=4, deadline_seconds=5.0)
    )
    assert ranks.run(2, partial(drained_after, given, 1)) == [EXIT_DRAINED] * 2
    ours, (last,) = Reader(tmp_path / begin.checkpoint / "step-00000000.0001"), saved(given)
    names = {piece.name: piece.global_shape for piece in ours.manifest.pieces}
    assert {f"outer.base.{name}" for name in names} <= {piece.name for piece in form.load(last).pieces}
    for name, shape in names.items():
        base, imported_, trained = torch.empty(shape), torch.empty(shape), torch.empty(shape)
        origin = (0,) * len(shape)
        Reader(last).read(Shard(f"outer.base.{name}", shape, origin, base))
        Reader(last).read(Shard(name, shape, origin, trained))
        ours.read(Shard(name, shape, origin, imported_))
        assert torch.equal(base, imported_), name
        assert not torch.equal(base, trained), name
    (tmp_path / "models").rename(tmp_path / "gone")
    written(given).drain.unlink()
    assert ranks.run(2, partial(drained_after, given, 2)) == [EXIT_DRAINED] * 2


def refused(given: Segment) -> str:
    try:
        started(given)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another hash", r"has none of sha256 000000000000..., but step-00000000.0001 \([0-9a-f]{12}...\)"),
        ("nothing there", "has none of sha256 [0-9a-f]{12}..., but none at all"),
        ("a bit", r"start.checkpoint: .*writer-00000.bin: bytes .* have crc32c"),
        ("another model", "its model has qkv_bias = True, this run's False"),
        ("another size", "its model has layers = 2, this run's 4"),
    ],
)
def test_what_cannot_be_started_from(ranks: Ranks, tmp_path: Path, what: str, message: str) -> None:
    _, begin, model = imported(tmp_path, "qwen2")
    if what == "another hash":
        begin = replace(begin, sha256="0" * 64)
    elif what == "nothing there":
        begin = replace(begin, checkpoint="elsewhere")
    elif what == "a bit":
        flip(tmp_path / "models" / "qwen2" / "step-00000000.0001" / "writer-00000.bin")
    elif what == "another model":
        model = replace(model, qkv_bias=False)
    else:
        model = replace(model, layers=4)
    (line,) = ranks.run(1, partial(refused, segment(tmp_path, Layout(), model=model, start=begin)))
    assert re.search(message, line), line


def test_positions_may_be_stretched(ranks: Ranks, tmp_path: Path) -> None:
    _, begin, model = imported(tmp_path, "mistral")
    longer = replace(model, rope_base=1e6, sliding_window=None)
    assert ranks.run(1, partial(refused, segment(tmp_path, Layout(), model=longer, start=begin))) == [""]
