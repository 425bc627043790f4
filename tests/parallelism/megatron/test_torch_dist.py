"""megatron-core reads the torch_dist that is exported, and what it writes is imported."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from checkpoints.attempts import candidates
from checkpoints.interop.exporting import main as exporting
from checkpoints.interop.importing import import_weights
from checkpoints.interop.shape import Shape
from checkpoints.reader import Reader, Shard
from clusters.segment import Segment
from parallelism.layout import VOCABULARY_MULTIPLE, Layout
from parallelism.megatron.trainer import Trainer, _bare
from tests.parallelism.forked import Ranks
from tests.parallelism.megatron.test_trainer import trainer
from tests.parallelism.samples import MODEL, segment

pytestmark = pytest.mark.ranks


def described(one: Trainer, *, stacked: bool) -> tuple[GPTModel, dict[str, object]]:
    torch.cuda.synchronize = lambda device=None: None  # megatron-core's saver waits for a device
    model = _bare(one.chunks[0])
    metadata = {"non_homogeneous_layers": not stacked, "dp_cp_group": one.groups.dp_cp}
    return model, model.sharded_state_dict(metadata=metadata)


def save(given: Segment, directory: str, stacked: bool) -> None:
    dist_checkpointing.save(described(trainer(given), stacked=stacked)[1], directory)
    dist.destroy_process_group()


def load(given: Segment, directory: str) -> float:
    """Overwritten weights, loaded back: the largest difference to what they were."""
    one = trainer(given)
    model, state = described(one, stacked=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data.fill_(7.0)
    found = dist_checkpointing.load({"model": state}, directory, validate_access_integrity=False)
    assert found["iteration"] == 0
    model.load_state_dict(found["model"])
    difference = 0.0
    for name, p in model.named_parameters():
        table = "embedding" in name or "output_layer" in name
        real = given.model.vocabulary_size - dist.get_rank() * p.shape[0]  # rows of tokens on this rank
        kept = slice(0, min(real, p.shape[0]) if table else p.shape[0])
        difference = max(difference, float((p.detach()[kept] - before[name][kept]).abs().max()))
    dist.destroy_process_group()
    return difference


@pytest.mark.parametrize("stacked", [True, False])
def test_in_from_megatron_and_out_to_it(ranks: Ranks, tmp_path: Path, stacked: bool) -> None:
    given = segment(tmp_path, Layout(tp=2))
    (tmp_path / "theirs").mkdir()
    ranks.run(2, partial(save, given, str(tmp_path / "theirs"), stacked))
    shape = Shape.from_facts({"model": vars(MODEL)})
    import_weights(tmp_path / "theirs", tmp_path / "ours", VOCABULARY_MULTIPLE, shape)
    (path,) = candidates(tmp_path / "ours")
    first = torch.empty(128, 32)
    Reader(path).read(Shard("decoder.layers.3.mlp.linear_fc1.weight", (128, 32), (0, 0), first))
    assert first.std() == pytest.approx(0.02, rel=0.1)
    assert exporting(["--format=torch_dist", str(path), str(tmp_path / "out")]) == 0
    for layout in (Layout(), Layout(tp=2)):
        again = segment(tmp_path, layout)
        place = str(tmp_path / "out" / "iter_0000000")
        assert ranks.run(layout.ranks, partial(load, again, place)) == [0.0] * layout.ranks
