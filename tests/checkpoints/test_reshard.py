"""Rewriting pieces: every bit, read once, in bounded memory, whatever interrupts it, and no damage passes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import manifest as form
from checkpoints import reshard as module
from checkpoints import slabs
from checkpoints.attempts import begin, commit, survey
from checkpoints.manifest import Damaged
from checkpoints.ranges import Box
from checkpoints.reader import Reader, Shard
from checkpoints.reshard import JOURNAL, Wanted, reshard
from checkpoints.store import write_shards

Grid = list[list[int]]  # by dimension: where it is cut


def boxes(shape: tuple[int, ...], cuts: Grid) -> list[Box]:
    """The cells of a grid over a tensor."""
    cells = [Box((), ())]
    for side, inner in zip(shape, cuts, strict=True):
        edges = [0, *sorted(set(inner) & set(range(1, side))), side]
        spans = [(a, b - a) for a, b in pairwise(edges)]
        cells = [Box((*c.offset, o), (*c.shape, n)) for c in cells for o, n in spans]
    return cells


def save(
    directory: Path, tensors: dict[str, torch.Tensor], cuts: dict[str, list[tuple[int, Box]]], writers: int
) -> Path:
    attempt = begin(directory, "step-00000007")
    for writer in range(writers):
        shards = [
            Shard(name, tuple(tensor.shape), box.offset, tensor[tuple(map(slice, box.offset, box.end))])
            for name, tensor in tensors.items()
            for to, box in cuts[name]
            if to == writer
        ]
        write_shards(attempt, writer, shards)
    commit(attempt, writers, "checkpoint", {"step": 7})
    return attempt


def layout(path: Path) -> set[tuple[Any, ...]]:
    return {(p.file, p.name, p.offset, p.shape) for p in form.load(path).pieces}


def contents(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    reader.verify()
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    for name, tensor in found.items():
        reader.read(Shard(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor))
    return found


cuts = st.lists(st.integers(1, 11), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    sources=st.lists(cuts, min_size=3, max_size=3),
    targets=st.lists(cuts, min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]),
    slab=st.sampled_from([1, 64, 1 << 20]),
    memory=st.sampled_from([0, 1 << 30]),
    block=st.sampled_from([16, 64, 1 << 20]),
)
def test_every_bit_arrives_in_the_pieces_that_were_wanted(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    sources: Grid,
    targets: Grid,
    dtype: torch.dtype,
    slab: int,
    memory: int,
    block: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("reshard")
    with pytest.MonkeyPatch.context() as patch:
        for place, name, value in (
            *((m, "SLAB", slab) for m in (slabs, module)),
            *((m, "BLOCK", block) for m in (slabs, module, form)),
        ):
            patch.setattr(place, name, value)
        tensor = torch.randint(0, 255, shape).to(dtype)
        tensors = {"w": tensor, "random.0": torch.arange(5, dtype=torch.uint8)}
        old = [(n % 2, b) for n, b in enumerate(boxes(shape, sources[: len(shape)]))]
        new = [(n % 3, b) for n, b in enumerate(boxes(shape, targets[: len(shape)]))]
        source = save(tmp_path, tensors, {"w": old, "random.0": [(1, Box((0,), (5,)))]}, 2)
        result = reshard(source, tmp_path / "new", {"w": new}, 3, {"step": 7}, memory=memory)
        for name, found in contents(result.path, tensors).items():
            assert torch.equal(found, tensors[name])
        assert {p for p in layout(result.path) if p[1] == "w"} == {
            (f"writer-{writer:05d}.bin", "w", box.offset, box.shape) for writer, box in new
        }
        size = sum(piece.bytes for piece in form.load(source).pieces)
        assert result.read_bytes >= size
        if memory:
            assert result.read_bytes == size  # every byte once


@pytest.fixture
def big(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], Wanted]:
    """Four tensors cut by columns, and how they are to be cut by rows."""
    tensors = {f"t{n}": torch.randn(64, 32) for n in range(4)}
    columns = {name: [(n, b) for n, b in enumerate(boxes((64, 32), [[], [16]]))] for name in tensors}
    rows = {name: [(n, b) for n, b in enumerate(boxes((64, 32), [[32], []]))] for name in tensors}
    return save(tmp_path / "old", tensors, columns, 2), tensors, rows


Big = tuple[Path, dict[str, torch.Tensor], Wanted]


def stop_after(count: int) -> Callable[[int], None]:
    """Fail when so many pieces have been written."""
    lock, left = threading.Lock(), [count]

    def told(_: int) -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")

    return told


def test_what_was_cut_short_is_taken_up_again(big: Big, tmp_path: Path) -> None:
    source, tensors, wanted = big
    target = tmp_path / "new"
    with pytest.raises(OSError, match="No space left"):
        reshard(source, target, wanted, 2, {"step": 7}, workers=1, was_written=stop_after(5))
    assert survey(target).intact == []
    (attempt,) = survey(target).uncommitted
    with (attempt / JOURNAL).open("a") as journal:
        journal.write('["t3", [[1')  # the kill tore a line
    result = reshard(source, target, wanted, 2, {"step": 7})
    assert result.path == attempt
    assert result.read_bytes == 2 * 64 * 32 * 4  # two of four tensors were done
    assert not (attempt / JOURNAL).exists()
    assert all(torch.equal(found, tensors[name]) for name, found in contents(attempt, tensors).items())


def test_other_work_is_not_taken_up(big: Big, tmp_path: Path) -> None:
    source, _, wanted = big
    target = tmp_path / "new"
    with pytest.raises(OSError, match="No space left"):
        reshard(source, target, wanted, 2, {"step": 7}, was_written=stop_after(3))
    other = reshard(source, target, {}, 2, {"step": 7})
    assert other.path.name == "step-00000007.0002"
    assert layout(other.path) == layout(source)  # nothing wanted: the pieces are kept
    assert len(survey(target).uncommitted) == 1


def test_a_second_process_is_kept_out(big: Big, tmp_path: Path) -> None:
    source, _, wanted = big
    refused = []

    def again(_: int) -> None:
        with pytest.raises(ValueError, match="another process is writing it") as refusal:
            reshard(source, tmp_path / "new", wanted, 2, {"step": 7})
        refused.append(refusal)

    reshard(source, tmp_path / "new", wanted, 2, {"step": 7}, workers=1, was_written=again)
    assert refused


def test_damage_in_the_source_is_told_and_nothing_committed(big: Big, tmp_path: Path) -> None:
    source, _, wanted = big
    file = source / "writer-00001.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    with pytest.raises(Damaged, match=r"writer-00001.bin: bytes 0 to 4096 \(t0\) have crc32c"):
        reshard(source, tmp_path / "new", wanted, 2, {"step": 7})
    assert survey(tmp_path / "new").intact == []


def test_damage_of_what_was_written_is_noticed_and_not_taken_up(
    big: Big, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, wanted = big
    target = tmp_path / "new"
    honest = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: honest(fd, bytes(len(data)), at))
    with pytest.raises(Damaged, match="have crc32c"):
        reshard(source, target, wanted, 2, {"step": 7})
    monkeypatch.undo()
    result = reshard(source, target, wanted, 2, {"step": 7})
    assert result.path.name == "step-00000007.0002"
    Reader(result.path).verify()


def test_pieces_that_do_not_cover_a_tensor_are_refused(big: Big, tmp_path: Path) -> None:
    source, _, wanted = big
    for bad in (wanted["t1"][:1], [(0, Box((0, 0), (65, 32)))], [(0, Box((0,), (64 * 32,)))]):
        with pytest.raises(ValueError, match=r"tensor 't1' of shape \(64, 32\): .* do not cover it"):
            reshard(source, tmp_path / "new", {**wanted, "t1": bad}, 2, {"step": 7})
    assert not (tmp_path / "new").exists()


def test_blocks_beyond_the_room_are_read_again(
    big: Big, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slab of 8 rows needs a block of either column; with room for one, both are read for every slab."""
    source, tensors, wanted = big
    for place in (slabs, module):
        monkeypatch.setattr(place, "SLAB", 8 * 32 * 4)
    result = reshard(source, tmp_path / "new", wanted, 2, {"step": 7}, memory=0)
    assert result.read_bytes == len(tensors) * 8 * 2 * (64 * 16 * 4)
