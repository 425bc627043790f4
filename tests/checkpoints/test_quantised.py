"""Quantised tensors: whoever cut them and whoever reads them, the same values, bit for bit."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import manifest
from checkpoints.attempts import begin, commit
from checkpoints.formats import DTYPES, ITEM_BYTES, QUANTISED, stored_bytes
from checkpoints.manifest import Damaged
from checkpoints.quantised import CutMaxima, cut_maxima, encode
from checkpoints.ranges import Box
from checkpoints.reader import QuantisedShard, Reader, Shard
from checkpoints.store import write_shards
from kernels.reference import dequantise, group_maxima, quantise

shapes = st.lists(st.integers(1, 5), max_size=2).flatmap(
    lambda lead: st.integers(1, 600).map(lambda last: (*lead, last))
) | st.just(())
forms = st.sampled_from(sorted(QUANTISED))


def values(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3


def expected(whole: torch.Tensor, form: str) -> torch.Tensor:
    """What a tensor comes to when nothing is cut."""
    what = QUANTISED[form]
    rows = whole.reshape(-1, whole.shape[-1] if whole.dim() else 1)
    codes, scales = quantise(rows, group_maxima(rows, what.group, 0), what.group, 0, what.bits)
    return dequantise(codes, scales, what.group, 0).view(whole.shape)


@st.composite
def cuttings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A layout: how a tensor may be cut into boxes along its dimensions."""
    sides = []
    for side in shape:
        inner = draw(st.lists(st.integers(1, side - 1), max_size=3, unique=True)) if side > 1 else []
        sides.append(list(itertools.pairwise([0, *sorted(inner), side])))
    return [
        Box(tuple(a for a, _ in part), tuple(b - a for a, b in part)) for part in itertools.product(*sides)
    ]


def shards(whole: torch.Tensor, boxes: list[Box], form: str, name: str = "w") -> list[QuantisedShard]:
    origin = Box((0,) * whole.dim(), tuple(whole.shape))
    parts = [(box.offset, whole[box.slices(origin)].clone()) for box in boxes]
    cuts = [c for at, part in parts for c in cut_maxima(name, origin.shape, at, part, QUANTISED[form])]
    return [QuantisedShard(name, origin.shape, at, part, form, cuts) for at, part in parts]


def written(folder: Path, *writers: list[QuantisedShard]) -> Path:
    attempt = begin(folder, "update")
    for number, part in enumerate(writers):
        write_shards(attempt, number, part)
    commit(attempt, len(writers), "update", {})
    return attempt


@settings(max_examples=30, deadline=None)
@given(st.data(), shapes, forms, st.integers(0, 9))
def test_every_layout_writes_and_reads_the_same_values(
    data: st.DataObject, shape: tuple[int, ...], form: str, seed: int
) -> None:
    whole = values(shape, seed)
    with tempfile.TemporaryDirectory() as folder:
        parts = shards(whole, data.draw(cuttings(shape)), form)
        reader = Reader(written(Path(folder), parts[::2], parts[1::2]))
        reader.verify()
        for box in data.draw(cuttings(shape)):
            found = torch.full(box.shape, torch.nan)
            reader.read(Shard("w", shape, box.offset, found))
            assert torch.equal(found, expected(whole, form)[box.slices(Box((0,) * len(shape), shape))])


@settings(max_examples=30, deadline=None)
@given(st.data(), shapes, forms)
def test_a_part_takes_as_many_bytes_as_its_place_tells(
    data: st.DataObject, shape: tuple[int, ...], form: str
) -> None:
    for shard in shards(values(shape), data.draw(cuttings(shape)), form):
        part = tuple(shard.tensor.shape)
        assert shard.stored().numel() == stored_bytes(form, shard.offset, part)


def test_cuts_of_other_tensors_and_places_do_no_harm() -> None:
    whole = values((4, 300))
    boxes = [Box((0, 0), (4, 100)), Box((0, 100), (4, 200))]
    parts = shards(whole, boxes, "int8g256")
    (cut,) = parts[0].cuts[:1]
    assert cut.box == Box((0, 0), (4, 1))
    others = [
        CutMaxima("v", cut.box, cut.maxima * 9),
        CutMaxima("w", Box((4, 0), (4, 1)), cut.maxima * 9),
        CutMaxima("w", Box((0, 1), (4, 1)), cut.maxima * 9),
    ]
    first = parts[0]
    assert torch.equal(
        encode("w", first.offset, first.tensor, QUANTISED["int8g256"], [*first.cuts, *others]), first.stored()
    )
    # and those of the right place count
    larger = CutMaxima("w", Box((0, 0), (4, 1)), cut.maxima * 9)
    assert not torch.equal(
        encode("w", first.offset, first.tensor, QUANTISED["int8g256"], [*first.cuts, larger]), first.stored()
    )


def test_no_layout_of_whole_groups_needs_to_tell_others() -> None:
    whole = values((4, 1024))
    boxes = [Box((0, 0), (4, 512)), Box((0, 512), (2, 512)), Box((2, 512), (2, 512))]
    assert all(shard.cuts == [] for shard in shards(whole, boxes, "int8g256"))


def test_a_scale_lies_first_and_codes_follow() -> None:
    whole = torch.tensor([[127.0, -2.0, 0.0], [0.5, 0.0, -63.5]])
    stored = shards(whole, [Box((0, 0), (2, 3))], "int8g256")[0].stored()
    scales = torch.tensor([1.0, 0.5]).bfloat16().view(torch.uint8)
    codes = torch.tensor([127, -2, 0, 1, 0, -127], dtype=torch.int8).view(torch.uint8)
    assert torch.equal(stored, torch.cat((scales, codes)))


@pytest.mark.parametrize(("form", "ratio"), [("int8g256", 3.97), ("int4g64", 7.53)])
def test_sizes_in_large(form: str, ratio: float) -> None:
    shape = (1024, 4096)
    assert stored_bytes("float32", (0, 0), shape) / stored_bytes(form, (0, 0), shape) == pytest.approx(
        ratio, abs=0.005
    )


def test_all_dtypes_have_a_size() -> None:
    assert {dtype: stored_bytes(dtype, (), ()) for dtype in DTYPES} == {
        **ITEM_BYTES, "int8g256": 3, "int4g64": 3,
    }  # fmt: skip


def test_a_quantised_tensor_is_read_as_fp32_only(tmp_path: Path) -> None:
    reader = Reader(written(tmp_path, shards(values((3, 5)), [Box((0, 0), (3, 5))], "int8g256")))
    with pytest.raises(ValueError, match=r"tensor 'w' is int8g256 .3, 5. here, not bfloat16"):
        reader.read(Shard("w", (3, 5), (0, 0), torch.empty(3, 5, dtype=torch.bfloat16)))


def test_damage_is_noticed_before_anything_is_decoded(tmp_path: Path) -> None:
    path = written(tmp_path, shards(values((3, 5)), [Box((0, 0), (3, 5))], "int4g64"))
    file = path / "writer-00000.bin"
    data = bytearray(file.read_bytes())
    target = torch.full((3, 5), 7.0)
    for position in range(len(data)):
        data[position] ^= 16
        file.write_bytes(data)
        with pytest.raises(Damaged, match="crc32c"):
            Reader(path).read(Shard("w", (3, 5), (0, 0), target))
        data[position] ^= 16
    assert bool((target == 7.0).all())


def test_a_piece_of_several_blocks(tmp_path: Path) -> None:
    whole, found = values((9, 512)), torch.empty(3, 512)
    with patch.object(manifest, "BLOCK", 1 << 10):
        reader = Reader(written(tmp_path, shards(whole, [Box((0, 0), (9, 512))], "int8g256")))
        assert len(reader.manifest.pieces[0].checksums) == 5
        reader.read(Shard("w", (9, 512), (4, 0), found))
    assert torch.equal(found, expected(whole[4:7], "int8g256"))
