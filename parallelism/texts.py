"""Reads text for training: JSON lines, one document each: {"text": "...", ...}."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

BATCH_BYTES = 1 << 20  # of text per call: 4 MiB is 3 % faster, and its encodings take 115 MiB more memory
PROGRESS_SECONDS = 2.0


class Source:
    """One JSONL file, read once in constant memory: its texts, and on the way its size and hash."""

    def __init__(self, path: Path, skip_malformed: bool = False) -> None:
        self.path = path
        self.skip_malformed = skip_malformed
        self.skipped = 0
        self.bytes_read = 0
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the bytes read so far."""
        return self._sha256.hexdigest()

    def __iter__(self) -> Iterator[str]:
        """Raises ValueError, naming file and line, at a line that is no document."""
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                self._sha256.update(line)
                self.bytes_read += len(line)
                if line.isspace():
                    continue
                try:
                    text = parse_document(line)
                except ValueError as error:
                    if not self.skip_malformed:
                        raise ValueError(
                            f'{self.path}, line {number}: {error}; allowed is an object with a string "text" '
                            "(--skip-malformed leaves such lines out)"
                        ) from error
                    self.skipped += 1
                    continue
                yield text


def parse_document(line: bytes) -> str:
    """The text of one JSON line. Raises ValueError, saying what is wrong, when there is none."""
    try:
        document = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ValueError('no string "text"')
    text: str = document["text"]
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # JSON allows them, UTF-8 does not
        raise ValueError("half a surrogate pair")
    return text


def batches(texts: Iterable[str], limit: int = BATCH_BYTES) -> Iterator[tuple[list[str], int]]:
    """Texts in groups of about `limit` bytes of UTF-8, with each group's size."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= limit:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


class Progress:
    """Tells on standard error how far one file is."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._total = source.path.stat().st_size
        self._tokens = 0
        self._began = self._told = time.monotonic()

    def show(self, added: int, last: bool = False) -> None:
        """Count tokens; every `PROGRESS_SECONDS` and at the end, print a line."""
        self._tokens += added
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS and not last:
            return
        self._told = now
        rate = self._source.bytes_read / max(now - self._began, 1e-9)
        done = f"{self._source.bytes_read / 1e6:.1f} of {self._total / 1e6:.1f} MB"
        sys.stderr.write(f"{self._source.path}: {done}, {rate / 1e6:.1f} MB/s, {self._tokens} tokens\n")
