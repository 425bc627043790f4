"""Directories of Megatron's torch_dist, which are torch's distributed checkpoints (DCP), without their code.

`.metadata` is a pickle that says which boxes of which tensors lie where in the `.distcp` files, each as a
torch.save of its own: a zip of a pickle and of plain bytes. Both pickles are read by checkpoints/interop/
pickles.py, so nothing of torch's own reader runs either.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints.interop import pickles, untrusted
from checkpoints.interop.pickles import Record, record
from checkpoints.ranges import Box

METADATA = ".metadata"
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, beside its directories iter_0000001, ...
LARGEST_METADATA = 1 << 30  # bytes
_LARGEST_PICKLE = 1 << 16  # of one item: a few hundred bytes for a tensor

_Metadata, _Tensor, _Bytes, _Index, _Chunk, _Storage, _Size = map(
    record, ("Metadata", "Tensor", "Bytes", "Index", "Chunk", "Storage", "Size")
)
_Properties, _Rebuilt, _Other = map(record, ("Properties", "Rebuilt", "Other"))
_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}  # fmt: skip
_DCP = "torch.distributed.checkpoint"
_NO_WEIGHTS = ("int64", "int32", "int16", "int8", "uint8", "bool")
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"  # where torch 2.2 kept some of them
_KEPT: dict[str, dict[str, Any]] = {
    f"{_DCP}.metadata": {
        "Metadata": _Metadata,
        "TensorStorageMetadata": _Tensor,
        "BytesStorageMetadata": _Bytes,
        "TensorProperties": _Properties,
        "ChunkStorageMetadata": _Chunk,
        "MetadataIndex": _Index,
    },
    f"{_DCP}.filesystem": {"_StorageInfo": _Storage},
    _OLDER: {"TensorProperties": _Properties},
    "torch": {"Size": _Size} | {name: name for name in (*_DTYPES, *_NO_WEIGHTS)},
}
_LEFT_ALONE = {
    f"{_DCP}.metadata": ("StorageMeta", "_MEM_FORMAT_ENCODING"),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    _OLDER: ("MEM_FORMAT_ENCODING",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
}
_NAMES = {(module, name): kind for module, names in _KEPT.items() for name, kind in names.items()} | {
    (module, name): _Other for module, names in _LEFT_ALONE.items() for name in names
}
_ITEM_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuilt,
    ("collections", "OrderedDict"): _Other,
    **{("torch", name): name for name in _STORAGES},
}


@dataclass
class Entry:
    """A tensor of the directory: where its boxes lie."""

    dtype: str
    shape: tuple[int, ...]
    chunks: dict[Box, tuple[str, int, int]] = field(default_factory=dict)  # file, first byte, bytes


def find(place: Path) -> Path | None:
    """The directory with `.metadata`: `place`, or the newest that Megatron's tracker there names; or none."""
    if (place / METADATA).is_file():
        return place
    if not (place / TRACKER).is_file():
        return None
    text = untrusted.regular(place, TRACKER).read_bytes()[:20].decode("ascii", "replace").strip()
    if text != "release" and not text.isdecimal():
        raise ValueError(f"{place / TRACKER}: {text!r} is not the number of an iteration")
    newest = place / (text if text == "release" else f"iter_{int(text):07d}")
    if not (newest / METADATA).is_file():
        raise ValueError(f"{newest}: has no {METADATA}; other forms than torch_dist are not read")
    return newest


def entries(directory: Path) -> dict[str, Entry]:
    """The tensors of a directory by name. Raises ValueError, with one line."""
    path = untrusted.regular(directory, METADATA)
    if (size := path.stat().st_size) > LARGEST_METADATA:
        raise ValueError(f"{directory / METADATA}: {size} bytes; at most {LARGEST_METADATA} are read")
    try:
        return _entries(pickles.read(path.read_bytes(), _NAMES))
    except ValueError as error:
        raise ValueError(f"{directory / METADATA}: {error}") from None


def _entries(metadata: Any) -> dict[str, Entry]:
    _is(metadata, _Metadata)
    found = {
        _text(name): Entry(_dtype(tensor.field("properties")), _sizes(tensor.field("size")))
        for name, tensor in _table(metadata.field("state_dict_metadata"))
        if isinstance(tensor, _Tensor)
    }
    shapes = {
        (name, _sizes(chunk.field("offsets"))): _sizes(chunk.field("sizes"))
        for name, tensor in _table(metadata.field("state_dict_metadata"))
        if isinstance(tensor, _Tensor)
        for chunk in _list(tensor.field("chunks"))
    }
    for index, storage in _table(metadata.field("storage_data")):
        name = _text(_is(index, _Index).field("fqn"))
        if name not in found:
            continue  # bytes of no tensor
        entry = found[name]
        offset = index.field("offset")
        start = _sizes(offset) if offset is not None else (0,) * len(entry.shape)
        box = Box(start, shapes.get((name, start), ()))
        if len(box.offset) != len(box.shape) or len(box.shape) != len(entry.shape):
            raise ValueError(f"{name[:100]!r} has a box that it does not list")
        if any(end > side for end, side in zip(box.end, entry.shape, strict=True)):
            raise ValueError(f"{name[:100]!r} has a box that reaches beyond it")
        entry.chunks[box] = _place(_is(storage, _Storage), name)
    return found


def _place(storage: Record, name: str) -> tuple[str, int, int]:
    if isinstance(storage.state, dict) and storage.state.get("transform_descriptors"):
        raise ValueError(f"{name[:100]!r} is compressed or encrypted, which is not supported")
    place = (_text(storage.field("relative_path")), storage.field("offset"), storage.field("length"))
    _sizes(place[1:])
    return place


def read_chunk(directory: Path, name: str, entry: Entry, box: Box) -> torch.Tensor:
    """The values of a box. Raises ValueError when they are not there, damaged, or something else."""
    file, offset, length = entry.chunks[box]
    if "/" in file or not file.endswith(".distcp"):
        raise ValueError(f"{directory}: {file[:100]!r} is not a plain name of a .distcp file")
    with untrusted.regular(directory, file).open("rb") as stream:
        stream.seek(offset)
        item = stream.read(length)
    try:
        values = _tensor(item)
        if tuple(values.shape) != box.shape or str(values.dtype) != f"torch.{entry.dtype}":
            raise ValueError(f"{tuple(values.shape)} of {values.dtype}, not {box.shape} of {entry.dtype}")
    except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory / file}: {name[:100]} at {box.offset}: {reason}") from None
    return values


def _tensor(item: bytes) -> torch.Tensor:
    """What torch.save wrote of one tensor; the zip's CRC-32 of its bytes is checked."""
    archive = zipfile.ZipFile(io.BytesIO(item))
    infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    for name, info in infos.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(item):
            raise ValueError(f"{name[:60]!r} is compressed")
    if "byteorder" in infos and archive.read(infos["byteorder"]) != b"little":
        raise ValueError("not little-endian")
    if "data.pkl" not in infos or infos["data.pkl"].file_size > _LARGEST_PICKLE:
        raise ValueError("not what torch.save writes of a tensor")
    rebuilt = _is(pickles.read(archive.read(infos["data.pkl"]), _ITEM_NAMES, tuple), _Rebuilt)
    storage, start, shape, strides, *_ = rebuilt.arguments
    kind, storage_type, key, *_ = storage
    if kind != "storage" or f"data/{_text(key)}" not in infos:
        raise ValueError("its bytes are not there")
    data = bytearray(archive.read(infos[f"data/{key}"]))  # torch wants a buffer that it could write to
    dtype = _DTYPES[_STORAGES[storage_type]]
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    (first,) = _sizes((start,))
    return flat.as_strided(_sizes(shape), _sizes(strides), first)  # which refuses to leave the bytes


def _is(value: Any, kind: type[Record]) -> Record:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} where {kind.__name__} should be")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where a name should be")
    return value


def _table(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise ValueError("no table where one should be")
    return iter(value.items())


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, Record) for item in value):
        raise ValueError("no list where one should be")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    """Whole numbers, plain or as torch's Size."""
    plain = value.arguments[0] if isinstance(value, _Size) and value.arguments else value
    if not isinstance(plain, tuple | list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in plain):
        raise ValueError("no sizes where they should be")
    return tuple(plain)


def _dtype(properties: Any) -> str:
    """TensorProperties keeps a tuple; the older one fields."""
    state = _is(properties, _Properties).state
    first = state[0] if isinstance(state, tuple) and state else properties.field("dtype")
    return _text(first)
