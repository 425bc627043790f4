"""torch's distributed checkpoints are read without torch's reader; crafted ones are refused."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from checkpoints.interop import torch_dist
from checkpoints.interop.torch_dist import Entry, entries, find, read_chunk
from checkpoints.ranges import Box

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(directory: Path, tensors: dict[str, Any]) -> None:
    dcp.save(tensors, checkpoint_id=directory, no_dist=True)


def metadata(directory: Path) -> Metadata:
    return pickle.loads((directory / ".metadata").read_bytes())


def rewrite(directory: Path, **changes: Any) -> None:
    told = metadata(directory)
    for name, value in changes.items():
        setattr(told, name, value)
    (directory / ".metadata").write_bytes(pickle.dumps(told))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_read_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 7, generator=generator).to(dtype), torch.randn(6, generator=generator).to(dtype)
    tensors = {"a": a, "transposed": a.t(), "b": b[2:5], "scalar": b[0], "none": a[:0], "other": {"x": 1}}
    save(tmp_path, {**tensors, "steps": torch.tensor([3])})
    found = entries(tmp_path)
    assert set(found) == {"a", "transposed", "b", "scalar", "none", "steps"}
    for name in ("a", "transposed", "b", "scalar", "none"):
        ((box, _),) = found[name].chunks.items()
        assert box == Box((0,) * tensors[name].dim(), tuple(tensors[name].shape))
        values = read_chunk(tmp_path, name, found[name], box)
        assert values.dtype == dtype
        assert torch.equal(values, tensors[name])


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.arange(64.0)})
    (entry,) = entries(tmp_path).values()
    ((box, (file, offset, _)),) = entry.chunks.items()
    data = bytearray((tmp_path / file).read_bytes())
    position = data.index(torch.arange(64.0).numpy().tobytes(), offset)
    data[position + 9] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=r"\.distcp: a at \(0,\): Bad CRC-32"):
        read_chunk(tmp_path, "a", entry, box)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def crafted(directory: Path, canary: Path) -> dict[str, bytes]:
    """What `.metadata` could be made: wholly, or in some field of an honest one."""
    save(directory, {"a": torch.ones(3)})
    made = {"instead": pickle.dumps(Evil(canary))}
    for field in ("state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version"):
        honest = metadata(directory)
        setattr(honest, field, Evil(canary))
        made[field] = pickle.dumps(honest)
    honest = metadata(directory)
    honest.storage_meta = StorageMeta(checkpoint_id=Evil(canary))  # type: ignore[arg-type]
    made["deep inside"] = pickle.dumps(honest)
    honest = metadata(directory)
    honest.storage_data[MetadataIndex("b")] = _StorageInfo(Evil(canary), 0, 1)  # type: ignore[arg-type]
    made["a file's name"] = pickle.dumps(honest)
    return made


def test_a_crafted_metadata_does_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, data in crafted(tmp_path / "x", canary).items():
        (tmp_path / "x" / ".metadata").write_bytes(data)
        with pytest.raises(
            ValueError, match=r"\.metadata: a pickle that names posix\.system, which is not allowed"
        ):
            entries(tmp_path / "x")
        assert not canary.exists(), name
    dcp.FileSystemReader(tmp_path / "x").read_metadata()
    assert canary.exists()  # what torch's own reader does with the last of them


def test_an_import_of_a_crafted_one_does_nothing(tmp_path: Path) -> None:
    """The whole child process, as the command starts it."""
    canary = tmp_path / "canary"
    made = crafted(tmp_path / "x", canary)
    (tmp_path / "x" / ".metadata").write_bytes(made["deep inside"])
    shape = (
        '{"layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "attention_heads": 1, "query_groups": 1, '
        + ('"vocabulary_size": 8}')
    )
    command = [sys.executable, "-P", "-m", "checkpoints.interop.importing", str(tmp_path / "x")]
    command += [str(tmp_path / "out"), "--vocabulary-multiple", "8", "--shape", shape]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "names posix.system, which is not allowed" in done.stderr
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def item(pickled: bytes, data: bytes = b"\0" * 12, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    return stream.getvalue()


def rebuilt(shape: tuple[int, ...], strides: tuple[int, ...], start: int = 0) -> bytes:
    """The pickle in a torch.save of one tensor, with whatever sizes."""
    tensor = torch.zeros(3)
    stream = io.BytesIO()
    torch.save(tensor, stream)
    data = zipfile.ZipFile(stream).read("archive/data.pkl")
    sizes = b"".join(
        b"(" + b"".join(b"J" + n.to_bytes(4, "little", signed=True) for n in s) + b"t"
        for s in (shape, strides)
    )
    head, tail = data.index(b"QK\x00"), data.index(b"\x89c")
    return data[:head] + b"QJ" + start.to_bytes(4, "little", signed=True) + sizes + data[tail:]


@pytest.mark.parametrize(
    ("shape", "strides", "start"),
    [
        ((3,), (1,), 1),
        ((4,), (1,), 0),
        ((3,), (1 << 30,), 0),
        ((3,), (-1,), 2),
        ((-3,), (1,), 0),
        ((3,), (1,), -1),
    ],
)
def test_sizes_stay_within_the_bytes(tmp_path: Path, shape: Any, strides: Any, start: int) -> None:
    assert chunk(tmp_path, item(rebuilt((3,), (1,))), (3,)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"x\.distcp: a at "):
        chunk(tmp_path, item(rebuilt(shape, strides, start)), shape)


def chunk(directory: Path, data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    (directory / "x.distcp").write_bytes(data)
    box = Box((0,) * len(shape), shape)
    return read_chunk(directory, "a", Entry("float32", shape, {box: ("x.distcp", 0, len(data))}), box)


def test_crafted_items_do_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    honest = rebuilt((3,), (1,))
    for data, message in (
        (item(pickle.dumps(Evil(canary))), "names posix.system, which is not allowed"),
        (pickle.dumps(Evil(canary)), "not a zip file"),
        (item(honest, compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (item(honest, data=b""), "not .3,. of float32|setStorage|out of bounds|,. of torch"),
        (item(pickle.dumps(torch.Size([3]))), "not allowed"),
        (item(pickle.dumps([1, 2])), "list where Rebuilt should be"),
        (item(honest)[:-30], "zip"),
        (item(b"x" * 70_000), "not what torch.save writes"),
    ):
        with pytest.raises(ValueError, match=message):
            chunk(tmp_path, data, (3,))
        assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_path": "../x.distcp"}, "is not a plain name"),
        ({"relative_path": "/etc/passwd"}, "is not a plain name"),
        ({"relative_path": ".metadata"}, "is not a plain name"),
        ({"relative_path": "y.distcp"}, "no such file"),
        ({"relative_path": 7}, "int where a name should be"),
        ({"offset": -1}, "no sizes"),
        ({"offset": 1 << 70}, "no sizes"),
        ({"length": 3}, "a at"),
        ({"transform_descriptors": ["zstd"]}, "compressed or encrypted"),
    ],
)
def test_places_stay_in_the_directory(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save(tmp_path, {"a": torch.ones(3)})
    told = metadata(tmp_path)
    for info in told.storage_data.values():
        vars(info).update(change)
    rewrite(tmp_path, storage_data=told.storage_data)
    with pytest.raises(ValueError, match=message):
        read_chunk(tmp_path, "a", (entry := entries(tmp_path)["a"]), next(iter(entry.chunks)))


def test_tables_that_contradict_themselves(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3)})
    honest = metadata(tmp_path)
    (info,) = honest.storage_data.values()
    rewrite(tmp_path, storage_data={MetadataIndex("a", torch.Size([1])): info})
    with pytest.raises(ValueError, match="'a' has a box that it does not list"):
        entries(tmp_path)
    honest.state_dict_metadata["a"].size = torch.Size([2])
    rewrite(tmp_path, storage_data=honest.storage_data, state_dict_metadata=honest.state_dict_metadata)
    with pytest.raises(ValueError, match="'a' has a box that reaches beyond it"):
        entries(tmp_path)
    for wrong in ({"storage_data": None}, {"state_dict_metadata": [1]}, {"state_dict_metadata": {3: info}}):
        rewrite(tmp_path, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"\.metadata: ") as refusal:
            entries(tmp_path)
        assert "\n" not in str(refusal.value)


def test_the_newest_iteration_is_found(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    save(tmp_path / "iter_0000012", {"a": torch.ones(1)})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    assert find(tmp_path) == find(tmp_path / "iter_0000012") == tmp_path / "iter_0000012"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("13")
    with pytest.raises(ValueError, match=r"iter_0000013: has no \.metadata"):
        find(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(ValueError, match="is not the number of an iteration"):
        find(tmp_path)


def test_a_huge_metadata_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"a": torch.ones(3)})
    monkeypatch.setattr(torch_dist, "LARGEST_METADATA", 10)
    with pytest.raises(ValueError, match="bytes; at most 10 are read"):
        entries(tmp_path)
