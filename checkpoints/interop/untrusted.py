"""What may be opened of a directory that somebody else made: plain names, JSON of bounded size, no way out.

Links are followed within the directory alone, and into the store of blobs beside it that Hugging Face's
cache keeps: another could lead to a file that is nobody's business and would be copied along.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
LARGEST_CONFIG = 1 << 20  # bytes
LARGEST_INDEX = 64 << 20  # half a million tensors
LARGEST_TOKENIZER = 256 << 20
# Text that transformers reads as data. No Python file is among them, and nothing here runs one.
TOKENIZER_JSON = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "generation_config.json",
)  # fmt: skip
TOKENIZER_OTHER = ("merges.txt", "tokenizer.model", "chat_template.jinja")

_WEIGHTS_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


def regular(directory: Path, name: str) -> Path:
    """The file `name` of `directory`. Raises ValueError unless it is one, and lies where it may."""
    path = directory / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):
        raise ValueError(f"{path}: no such file") from None
    allowed = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        allowed.append(directory.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise ValueError(f"{path}: a link that leads out of the directory")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: not a regular file")
    return target


def read_json(directory: Path, name: str, largest: int) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ValueError."""
    path = regular(directory, name)
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{directory / name}: {size} bytes; at most {largest} are read")
    try:
        found = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory / name}: not JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{directory / name}: not a JSON object")
    return found


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model. Raises ValueError."""
    if not (directory / INDEX).exists():
        if not (directory / SINGLE).exists():
            raise ValueError(f"{directory}: has neither {SINGLE} nor {INDEX}; no other weights are read")
        return [regular(directory, SINGLE)]
    table = read_json(directory, INDEX, LARGEST_INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{directory / INDEX}: has no weight_map")
    for name in table.values():
        if not isinstance(name, str) or not _WEIGHTS_FILE.fullmatch(name):
            raise ValueError(
                f"{directory / INDEX}: {str(name)[:100]!r} is not a plain name of a weights file"
            )
    return [regular(directory, name) for name in sorted(set(table.values()))]


def tokenizer_files(directory: Path) -> list[str]:
    """Names of a tokenizer's files that are there. Raises ValueError where one is not what it should be."""
    found = [name for name in (*TOKENIZER_JSON, *TOKENIZER_OTHER) if (directory / name).exists()]
    for name in found:
        path = regular(directory, name)
        if name in TOKENIZER_JSON:
            read_json(directory, name, LARGEST_TOKENIZER)
        elif path.stat().st_size > LARGEST_TOKENIZER:
            raise ValueError(f"{directory / name}: more than {LARGEST_TOKENIZER} bytes")
    return found


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer's files; their names. Raises ValueError."""
    names = tokenizer_files(source)
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(regular(source, name), target / name)
    return names
