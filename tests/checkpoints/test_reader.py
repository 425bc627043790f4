"""Any layout reads what any other wrote, a block at a time, and damage is never loaded."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import manifest as form
from checkpoints.attempts import begin, commit
from checkpoints.manifest import Damaged
from checkpoints.reader import Missing, Reader, Shard
from checkpoints.store import write_shards

Grid = list[list[int]]  # per dimension: where the parts begin, and the end
DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64,
    torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, shape, generator=generator).to(dtype)


def parts(grid: Grid) -> Iterator[tuple[slice, ...]]:
    return itertools.product(*([slice(a, b) for a, b in itertools.pairwise(cuts)] for cuts in grid))


def cut(name: str, tensor: torch.Tensor, index: tuple[slice, ...]) -> Shard:
    return Shard(name, tuple(tensor.shape), tuple(s.start for s in index), tensor[index])


def save(directory: Path, writers: list[list[Shard]], step: int = 1) -> Path:
    attempt = begin(directory, f"step-{step:08d}")
    for writer, shards in enumerate(writers):
        write_shards(attempt, writer, shards)
    commit(attempt, len(writers), "checkpoint", {"step": step})
    return attempt


def whole(name: str, tensor: torch.Tensor) -> Shard:
    return Shard(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def read_whole(reader: Reader, name: str, like: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(like)
    reader.read(whole(name, found))
    return found


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> Grid:
    return [
        sorted({0, side, *draw(st.lists(st.integers(0, side), max_size=3))}) if side else [0, 0]
        for side in shape
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, Grid, Grid]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    tensor = values(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    return tensor, draw(grids(shape)), draw(grids(shape))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(layouts(), st.sampled_from([8, 16, 64, form.BLOCK]), st.integers(1, 3), st.randoms())
def test_any_grid_reads_any_grid(
    layout: tuple[torch.Tensor, Grid, Grid], block: int, writers: int, random: object
) -> None:
    tensor, written, wanted = layout
    shards = [cut("w", tensor, index) for index in parts(written)]
    random.shuffle(shards)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch, patch.object(form, "BLOCK", block):
        path = save(Path(scratch), [shards[n::writers] for n in range(writers)])
        reader = Reader(path)
        reader.verify()
        found = torch.zeros_like(tensor)
        for index in parts(wanted):
            reader.read(cut("w", found, index))
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dtypes_survive_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (3, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)  # NaNs and infinities included
    reader = Reader(save(tmp_path, [[whole("w", tensor)]]))
    assert torch.equal(read_whole(reader, "w", tensor).view(torch.uint8), tensor.view(torch.uint8))


def test_strided_and_trained_tensors_are_written_and_filled(tmp_path: Path) -> None:
    tensor = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    reader = Reader(save(tmp_path, [[Shard("w", (4, 3), (0, 0), tensor.t())]]))
    found = torch.nn.Parameter(torch.zeros(3, 4))
    reader.read(Shard("w", (4, 3), (0, 0), found.t()))
    assert torch.equal(found, tensor)
    assert found.grad_fn is None


def test_replicas_read_as_one(tmp_path: Path) -> None:
    tensor = values((6, 4), torch.float32)
    top, bottom, middle = ((slice(a, b), slice(0, 4)) for a, b in ((0, 4), (3, 6), (1, 5)))
    writers = [[cut("w", tensor, index)] for index in (top, top, bottom, middle)]
    reader = Reader(save(tmp_path, writers))
    assert torch.equal(read_whole(reader, "w", tensor), tensor)


def test_replicas_are_read_once(tmp_path: Path) -> None:
    tensor = values((6, 4), torch.float32)
    path = save(tmp_path, [[whole("w", tensor)], [whole("w", tensor)]])
    flip(path / "writer-00001.bin", 5)  # the replica that is not needed
    assert torch.equal(read_whole(Reader(path), "w", tensor), tensor)
    with pytest.raises(Damaged):
        Reader(path).verify()


def flip(path: Path, position: int, bit: int = 3) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        (old,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([old ^ 1 << bit]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"a": values((50, 40), torch.float32), "b": values((7,), torch.bool)}
    return save(tmp_path, [[whole(n, t)] for n, t in tensors.items()] + [[whole("c", torch.ones(3))] * 2])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(st.data())
def test_a_flipped_bit_anywhere_is_noticed(saved: Path, data: st.DataObject) -> None:
    file = saved / data.draw(st.sampled_from(sorted(Reader(saved).manifest.files)))
    position = data.draw(st.integers(0, file.stat().st_size - 1))  # padding included
    bit = data.draw(st.integers(0, 7))
    Reader(saved).verify()
    flip(file, position, bit)
    with pytest.raises(Damaged, match=file.name):
        Reader(saved).verify()
    flip(file, position, bit)


def test_damage_is_named_and_never_loaded(saved: Path) -> None:
    flip(saved / "writer-00000.bin", 1234)
    found = torch.zeros(50, 40)
    with pytest.raises(Damaged, match=r"writer-00000.bin: bytes 0 to 8000 \(a\) have crc32c [0-9a-f]{8}"):
        Reader(saved).read(whole("a", found))
    assert not found.any()


def test_only_blocks_that_are_needed_are_read(tmp_path: Path) -> None:
    tensor = values((64, 64), torch.float32)  # 256 bytes per row
    with patch.object(form, "BLOCK", 1024):  # four rows per block
        path = save(tmp_path, [[whole("w", tensor)]])
        flip(path / "writer-00000.bin", 5 * 256)  # row 5, in the second block
        reader = Reader(path)
        for rows in (slice(0, 4), slice(8, 64)):
            found = torch.zeros_like(tensor)
            shard = cut("w", found, (rows, slice(3, 9)))
            reader.read(shard)
            assert torch.equal(shard.tensor, tensor[rows, 3:9])
        with pytest.raises(Damaged):
            reader.read(cut("w", torch.zeros_like(tensor), (slice(0, 5), slice(0, 1))))


def test_a_block_is_read_once_for_shards_that_follow_each_other(tmp_path: Path) -> None:
    """As the boxes of a distributed optimizer's share do; a failed read leaves nothing behind."""
    tensors = {name: values((6, 4), torch.float32, seed) for seed, name in enumerate("ab")}
    reader = Reader(save(tmp_path, [[whole(name, tensor) for name, tensor in tensors.items()]]))
    boxes = [(slice(0, 1), slice(2, 4)), (slice(1, 5), slice(0, 4)), (slice(5, 6), slice(0, 1))]
    with patch.object(reader._blocks, "_bytes", wraps=reader._blocks._bytes) as reads:
        for name in "aba":
            for box in boxes:
                shard = cut(name, torch.zeros(6, 4), box)
                reader.read(shard)
                assert torch.equal(shard.tensor, tensors[name][box])
        assert reads.call_count == 3
    flip(reader.path / "writer-00000.bin", 4096)  # of b
    with pytest.raises(Damaged):
        reader.read(whole("b", torch.zeros(6, 4)))
    assert torch.equal(read_whole(reader, "a", tensors["a"]), tensors["a"])


@pytest.mark.parametrize("change", ["removed", "shorter", "longer", "a link"])
def test_files_of_another_size_are_damage(saved: Path, change: str) -> None:
    file = saved / "writer-00000.bin"
    data = file.read_bytes()
    file.unlink()
    if change == "a link":
        (saved / "target").write_bytes(data)
        file.symlink_to("target")
    elif change != "removed":
        file.write_bytes(data[:-1] if change == "shorter" else data + b"x")
    with pytest.raises(Damaged, match=r"writer-00000.bin"):
        Reader(saved)


def test_a_file_that_shrinks_or_goes_while_it_is_read_is_damage(saved: Path) -> None:
    reader = Reader(saved)
    file = saved / "writer-00000.bin"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Damaged, match="ends after byte 100"):
        reader.read(whole("a", torch.zeros(50, 40)))
    file.unlink()
    with pytest.raises(Damaged, match="cannot be read: No such file"):
        reader.read(whole("a", torch.zeros(50, 40)))


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    tensor = values((6, 4), torch.float32)
    left, corner = (slice(0, 6), slice(0, 2)), (slice(0, 3), slice(2, 4))
    reader = Reader(save(tmp_path, [[cut("w", tensor, left), cut("w", tensor, corner)]]))
    reader.read(cut("w", tensor.clone(), (slice(0, 3), slice(0, 4))))
    with pytest.raises(Missing, match=r"tensor 'w' has no piece at \(3, 2\) of shape \(3, 2\)"):
        reader.read(whole("w", tensor.clone()))
    with pytest.raises(KeyError, match="tensor 'v' has no piece at"):
        reader.read(whole("v", tensor.clone()))


def test_another_shape_or_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor 'a' is float32 \(50, 40\) here, not float16 \(50, 40\)"):
        Reader(saved).read(whole("a", torch.zeros(50, 40, dtype=torch.float16)))
    with pytest.raises(ValueError, match=r"not float32 \(50, 41\)"):
        Reader(saved).read(whole("a", torch.zeros(50, 41)))


def test_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Reader(begin(tmp_path, "step-00000001"))


MEMORY = """
import re, sys, torch
from pathlib import Path
from checkpoints.reader import Reader, Shard
found = torch.ones(4096, 256)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
before = peak()
Reader(Path(sys.argv[1])).read(Shard("w", (4096, 16384), (0, 512), found))
assert torch.equal(found, torch.arange(4096.0)[:, None].expand(4096, 256))
print(peak() - before)
"""


def test_reading_a_strip_of_every_block_takes_the_memory_of_one(tmp_path: Path) -> None:
    tensor = torch.arange(4096.0)[:, None].expand(4096, 16384)  # 256 MiB once written: four blocks
    attempt = begin(tmp_path, "big")
    assert write_shards(attempt, 0, [Shard("w", (4096, 16384), (0, 0), tensor)]) == 4 * form.BLOCK
    commit(attempt, 1, "checkpoint", {"step": 0})
    command = [sys.executable, "-P", "-c", MEMORY, str(attempt)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 60 < grown < 64 + 16, f"{grown} MiB"
