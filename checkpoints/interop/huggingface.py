"""Hugging Face's directories of safetensors: read into a checkpoint of ours, and written from one.

Rows stream through: at most one block of rows (import) or one tensor of ours (export) lies in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from checkpoints.interop import untrusted
from checkpoints.interop.families import config_of, shape_of
from checkpoints.interop.shape import EMBEDDING, Counterpart, Rows, Shape, counterparts
from checkpoints.interop.vocabulary import padding
from checkpoints.reader import Reader, Shard

CHUNK = 64 << 20  # bytes of rows, in fp32, that are converted at a time
SHARD = 5 << 30  # bytes of a weights file, as transformers cuts them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old files carry; follows from the config

Told = Callable[[int], object]  # is told of so many bytes done


class Model:
    """A directory of Hugging Face's: its shape, and its tensors, checked against each other."""

    format = "hf"

    def __init__(self, directory: Path, multiple: int) -> None:
        """`multiple` is that of the padded vocabulary. Raises ValueError."""
        self.directory = directory
        self.config = untrusted.read_json(directory, untrusted.CONFIG, untrusted.LARGEST_CONFIG)
        self.shape = shape_of(self.config)
        self.padded = -(-self.shape.vocabulary_size // multiple) * multiple
        self._files: dict[str, Any] = {}
        for path in untrusted.weight_files(directory):
            with _opened(path):
                opened: Any = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)
        self.parts = list(self._checked())
        self.dtypes = {self._files[part.theirs].get_slice(part.theirs).get_dtype() for part in self.parts}

    @property
    def bytes(self) -> int:
        """Of all weights in fp32, as a checkpoint of ours holds them."""
        return sum(4 * torch.Size(part.shape).numel() for part in self.parts)

    @property
    def positions(self) -> int | None:
        longest = self.config.get("max_position_embeddings")
        return longest if type(longest) is int and longest > 0 else None

    def shards(self, told: Told) -> Iterator[Shard]:
        """All weights in fp32, under our names."""
        for part in self.parts:
            total = torch.zeros(part.shape[1:], dtype=torch.float64)
            for rows in part.rows:
                for piece in _chunks(rows):
                    values = self._rows(part.theirs, piece)
                    told(values.nbytes)
                    if part.padding and part.predicts:
                        total += values.sum(dim=0, dtype=torch.float64)
                    yield _shard(piece, values)
            if part.padding:
                yield padding(part.padding, total / part.shape[0], predicts=part.predicts)

    def _rows(self, name: str, rows: Rows) -> torch.Tensor:
        with _opened(self.directory):
            values: torch.Tensor = self._files[name].get_slice(name)[rows.start : rows.stop]
        return values.to(torch.float32)

    def _checked(self) -> Iterator[Counterpart]:
        left = {name for name in self._files if not name.endswith(_IGNORED)}
        for part in counterparts(self.shape, self.padded):
            if part.theirs not in left:
                raise ValueError(f"{self.directory}: has no tensor {part.theirs}")
            left.remove(part.theirs)
            held = self._files[part.theirs].get_slice(part.theirs)
            if (found := tuple(held.get_shape())) != part.shape:
                raise ValueError(f"{self.directory}: {part.theirs} is {found}; by its config {part.shape}")
            if held.get_dtype() not in _CODES.values():
                allowed = ", ".join(_CODES.values())
                raise ValueError(
                    f"{self.directory}: {part.theirs} is {held.get_dtype()} (allowed: {allowed})"
                )
            yield part
        if self.shape.tied_embeddings:
            left.discard("lm_head.weight")  # a copy of the embedding
        if left:
            raise ValueError(f"{self.directory}: {min(left)[:100]!r} belongs to no model of this family")


class _opened:  # noqa: N801 - reads as what it is
    """Turns the library's complaint about a file into ours."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SafetensorError | RuntimeError | UnicodeError | OverflowError):
            raise ValueError(f"{self.path}: not a whole safetensors file: {str(error)[:200]}") from None


def _chunks(rows: Rows) -> Iterator[Rows]:
    """The same rows, so many at a time that they make CHUNK bytes at most."""
    at_once = max(1, CHUNK // (4 * torch.Size(rows.global_shape[1:]).numel()))
    for start in range(rows.start, rows.stop, at_once):
        first = rows.first + start - rows.start
        yield Rows(rows.ours, rows.global_shape, first, start, min(start + at_once, rows.stop))


def _shard(rows: Rows, values: torch.Tensor) -> Shard:
    return Shard(rows.ours, rows.global_shape, (rows.first, *(0 for _ in rows.global_shape[1:])), values)


@dataclass
class Export:
    """A checkpoint of ours on its way out."""

    reader: Reader
    shape: Shape
    dtype: str  # a key of DTYPES
    _held: tuple[str, torch.Tensor] | None = None

    @property
    def parts(self) -> list[Counterpart]:
        """All tensors of theirs. Raises ValueError for a checkpoint of no model."""
        return list(counterparts(self.shape, self.padded_vocabulary))

    @property
    def padded_vocabulary(self) -> int:
        """Rows of its embedding. Raises ValueError when it has none."""
        rows = {p.name: p.global_shape[0] for p in self.reader.manifest.pieces if p.name == EMBEDDING}
        if not rows:
            raise ValueError(f"{self.reader.path}: holds no embedding; is it a checkpoint of a model?")
        return rows[EMBEDDING]

    def tensor(self, part: Counterpart) -> torch.Tensor:
        """A tensor of theirs, in the dtype of the export. Raises Missing, Damaged."""
        whole = self.whole(part.rows[0].ours, part.rows[0].global_shape)
        values = [whole[rows.first : rows.first + rows.stop - rows.start] for rows in part.rows]
        return torch.cat(values).to(DTYPES[self.dtype])

    def whole(self, ours: str, global_shape: tuple[int, ...]) -> torch.Tensor:
        """Ours in fp32, read once for all of theirs that are made of it, which follow one another."""
        if self._held is None or self._held[0] != ours:
            self._held = None  # before the next is made: two would not fit the bound
            values = torch.empty(global_shape)
            self.reader.read(Shard(ours, global_shape, (0,) * values.dim(), values))
            self._held = ours, values
        return self._held[1]

    def bytes(self, part: Counterpart) -> int:
        return torch.Size(part.shape).numel() * DTYPES[self.dtype].itemsize

    def write(self, target: Path, positions: int, told: Told) -> None:
        """config.json and the weights, into an empty directory."""
        (target / untrusted.CONFIG).write_text(_json(config_of(self.shape, self.dtype, positions)))
        files = _files(self.parts, self.bytes)
        for name, parts in files.items():
            with (target / name).open("xb") as stream:
                self._write_file(stream, parts, told)
        if len(files) > 1:
            table = {part.theirs: name for name, parts in files.items() for part in parts}
            total = sum(map(self.bytes, self.parts))
            index = {"metadata": {"total_size": total}, "weight_map": table}
            (target / untrusted.INDEX).write_text(_json(index))

    def _write_file(self, stream: BinaryIO, parts: list[Counterpart], told: Told) -> None:
        """huggingface.co/docs/safetensors: 8 bytes of length, JSON, then the tensors without gaps."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in parts:
            start, end = end, end + self.bytes(part)
            facts = {"dtype": _CODES[self.dtype], "shape": part.shape, "data_offsets": [start, end]}
            entries[part.theirs] = facts
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        stream.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            data = self.tensor(part).contiguous().view(-1).view(torch.uint8).numpy().data
            stream.write(data)
            told(data.nbytes)


def _files(parts: list[Counterpart], size: Callable[[Counterpart], int]) -> dict[str, list[Counterpart]]:
    """Which file each tensor goes into: a new one where SHARD would be passed."""
    groups: list[list[Counterpart]] = [[]]
    filled = 0
    for part in parts:
        if groups[-1] and filled + size(part) > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size(part)
    if len(groups) == 1:
        return {untrusted.SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": g for n, g in enumerate(groups, start=1)}


def _json(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=2) + "\n"
