"""Megatron's names and boxes <-> ours, whatever was cut and padded how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoints.attempts import candidates
from checkpoints.interop.exporting import main as exporting
from checkpoints.interop.importing import import_weights
from checkpoints.interop.megatron import Model, stacked, wanted
from checkpoints.interop.shape import Shape
from checkpoints.reader import Reader, Shard

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPE = Shape(2, 8, 12, 4, 2, 10, qkv_bias=True)
MULTIPLE = 16
Tensors = dict[str, torch.Tensor]


def tensors(rows: int = 10, seed: int = 1) -> Tensors:
    """All of ours, at random; the vocabulary padded to so many rows."""
    generator = torch.Generator().manual_seed(seed)
    return {w.name: torch.randn(w.global_shape, generator=generator) for w in wanted(SHAPE, rows)}


def as_stacked(given: Tensors) -> Tensors:
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in given.items():
        together = stacked(name)
        found.setdefault(together[0] if together else name, []).append(tensor)
    return {n: torch.stack(t) if n.startswith("decoder.layers.") else t[0] for n, t in found.items()}


def save(directory: Path, given: Tensors) -> None:
    dcp.save(dict(given), checkpoint_id=directory, no_dist=True)


def read(place: Path) -> Tensors:
    reader = Reader(candidates(place)[0])
    found = {}
    for name, shape in {p.name: p.global_shape for p in reader.manifest.pieces}.items():
        found[name] = torch.full(shape, torch.nan)
        reader.read(Shard(name, shape, (0,) * len(shape), found[name]))
    return found


def expect(found: Tensors, given: Tensors) -> None:
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        table = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        assert found[name].shape[0] == (16 if table else tensor.shape[0])
        assert torch.equal(found[name][:10] if table else found[name], tensor[:10] if table else tensor), name
        assert not found[name].isnan().any()


def test_layers_by_name(tmp_path: Path) -> None:
    save(tmp_path / "theirs", tensors())
    import_weights(tmp_path / "theirs", tmp_path / "ours", MULTIPLE, SHAPE)
    expect(read(tmp_path / "ours"), tensors())


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("rows", [10, 12, 64])
def test_prefixes_and_other_paddings(tmp_path: Path, prefix: str, rows: int) -> None:
    given = tensors(rows)
    state = {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in given.items()}
    save(tmp_path / "theirs", {prefix + name: tensor for name, tensor in given.items()} | state)
    import_weights(tmp_path / "theirs", tmp_path / "ours", MULTIPLE, SHAPE)
    found = read(tmp_path / "ours")
    expect(found, given)
    assert torch.allclose(found["output_layer.weight"][10:], given["output_layer.weight"][:10].mean(0))


def test_the_optimizers_weights_are_the_better_ones(tmp_path: Path) -> None:
    masters = {f"optimizer.state.fp32_param.{name}": tensor for name, tensor in tensors().items()}
    rounded = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    save(tmp_path / "theirs", masters | rounded)
    import_weights(tmp_path / "theirs", tmp_path / "ours", MULTIPLE, SHAPE)
    expect(read(tmp_path / "ours"), tensors())
    save(tmp_path / "flat", {name: tensor.flatten() for name, tensor in masters.items()} | rounded)
    import_weights(tmp_path / "flat", tmp_path / "ours2", MULTIPLE, SHAPE)
    matrices = {name: tensor.float() for name, tensor in rounded.items() if tensor.dim() == 2}
    expect(read(tmp_path / "ours2"), {**tensors(), **matrices})  # rows of one tensor are flat anyway


def test_out_and_in_again(tmp_path: Path) -> None:
    save(tmp_path / "theirs", tensors())
    import_weights(tmp_path / "theirs", tmp_path / "ours", MULTIPLE, SHAPE)
    assert exporting(["--format=torch_dist", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    import_weights(tmp_path / "out", tmp_path / "again", MULTIPLE, SHAPE)
    ours, again = read(tmp_path / "ours"), read(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_reads_what_is_written(tmp_path: Path, dtype: str) -> None:
    save(tmp_path / "theirs", tensors())
    import_weights(tmp_path / "theirs", tmp_path / "ours", MULTIPLE, SHAPE)
    words = ["--format=torch_dist", f"--dtype={dtype}", str(tmp_path / "ours"), str(tmp_path / "out")]
    assert exporting(words) == 0
    expected = {n: t.to(getattr(torch, dtype)) for n, t in as_stacked(read(tmp_path / "ours")).items()}
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path / "out" / "iter_0000000", no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    common = torch.load(tmp_path / "out" / "iter_0000000" / "common.pt", weights_only=True)
    assert common["iteration"] == 0
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"


FIRST = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), f"has no tensor {FIRST}"),
        (lambda t: t.pop("embedding.word_embeddings.weight"), "not a GPT of megatron-core"),
        (lambda t: t.update({FIRST: torch.ones(24, 9)}), r"is \(24, 9\); by its model \(24, 8\)"),
        (lambda t: t.update({"output_layer.weight": torch.ones(9, 8)}), r"is \(9, 8\)"),
        (
            lambda t: t.update({"decoder.layers.2.x": torch.ones(1)}),
            "'decoder.layers.2.x' belongs to no model",
        ),
        (lambda t: t.update({FIRST: torch.ones(24, 8, dtype=torch.int8)}), "names torch.CharStorage"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    given = tensors()
    change(given)
    save(tmp_path / "theirs", given)
    with pytest.raises(ValueError, match=message):
        list(Model(tmp_path / "theirs", SHAPE, MULTIPLE).shards(lambda count: None))


def test_the_shape_must_be_said_where_it_is_not_told(tmp_path: Path) -> None:
    save(tmp_path / "theirs", tensors())
    with pytest.raises(ValueError, match="does not tell the model's shape: say --model"):
        import_weights(tmp_path / "theirs", tmp_path / "ours", MULTIPLE)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="leave out --model"):
        import_weights(tmp_path / "other", tmp_path / "ours", MULTIPLE, SHAPE)


def test_what_belongs_to_a_layer() -> None:
    assert stacked("decoder.layers.12.mlp.linear_fc1.weight") == ("decoder.layers.mlp.linear_fc1.weight", 12)
    assert stacked("decoder.final_layernorm.weight") is None
