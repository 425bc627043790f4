"""Text to tokens: trains a byte-level BPE, and turns JSON lines into Megatron's .bin/.idx pairs.

    python -P -m parallelism.tokenize train --output tokenizer.json --vocabulary 8192 TEXT.jsonl ...
    python -P -m parallelism.tokenize encode --tokenizer tokenizer.json --output PREFIX TEXT.jsonl ...

A line is one document: {"text": "...", ...}. `encode` joins its inputs, in their order, into `PREFIX.bin` and
`PREFIX.idx`, with `PREFIX.json` (`Encoded`) beside them; an output that is whole and of the same text and
tokenizer is kept. Standard output carries one line of JSON, standard error the progress. Memory: one batch of
text (`texts.BATCH_BYTES`) or the longest document, and about 100 bytes per document for the index.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from clusters.paths import sync_directory, write_atomically
from parallelism.texts import Progress, Source, batches

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of a document


@dataclass(frozen=True)
class Encoded:
    """What a .bin/.idx pair was made from and holds; lies beside it as `<prefix>.json`."""

    sources_sha256: tuple[str, ...]
    tokenizer_sha256: str
    bin_sha256: str
    idx_sha256: str
    documents: int
    tokens: int  # ends of documents included
    text_bytes: int  # of UTF-8
    skipped_lines: int
    vocabulary_size: int
    end_of_document: int
    dtype: str  # of one token in the .bin file

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Encoded:
        """Raises ValueError when the text is not such a record."""
        try:
            raw = json.loads(text)
            return cls(**{**raw, "sources_sha256": tuple(raw["sources_sha256"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a record of encoded text: {error}") from error


def train(sources: Iterable[Path], output: Path, vocabulary_size: int) -> int:
    """Train a byte-level BPE, lossless on any text, and write its tokenizer.json; returns its size.

    The size is below `vocabulary_size` where the text has too few different pairs. The same texts give
    the same file. Raises ValueError at a malformed line or an impossible size.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocabulary of {vocabulary_size}: allowed is {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for path in sources for text in Source(path)), trainer)
    write_atomically(output, tokenizer.to_str(pretty=True))
    return int(tokenizer.get_vocab_size())


class TextEncoder:
    """A tokenizer.json, ready to turn texts into token ids."""

    def __init__(self, path: Path, end_of_document: str = END_OF_DOCUMENT) -> None:
        """Raises ValueError when the file is no tokenizer or lacks the end of document."""
        content = path.read_bytes()
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
        # A document that quotes "<|endoftext|>" must not end there.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        if end_of_document not in vocabulary:
            raise ValueError(f"{path}: has no token {end_of_document!r} to end a document with")
        self.end_of_document: int = vocabulary[end_of_document]
        self.vocabulary_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.sha256 = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[str], dtype: type[np.integer]) -> list[np.ndarray]:
        """The token ids of every text, each with the end of document after it."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.end_of_document], dtype=dtype) for encoding in encodings]


class Output:
    """The files of one prefix. At every instant they are whole or cannot be loaded, as .idx comes last."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        attempt = secrets.token_hex(4)  # not the process id: two nodes may share the directory
        self.bin_attempt, self.idx_attempt = (
            self.prefix.with_name(f".{prefix.name}.{end}.{attempt}.tmp") for end in ("bin", "idx")
        )

    def path(self, end: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.{end}")

    def finished(self, sources: Sequence[Path], encoder: TextEncoder, skip_malformed: bool) -> Encoded | None:
        """What lies there, if it is undamaged and encoding again would give the same."""
        try:
            facts = Encoded.from_json(self.path("json").read_text())
            current = (
                facts.tokenizer_sha256 == encoder.sha256
                and facts.end_of_document == encoder.end_of_document
                and (skip_malformed or not facts.skipped_lines)
                and facts.bin_sha256 == _sha256(self.path("bin"))
                and facts.idx_sha256 == _sha256(self.path("idx"))
                and facts.sources_sha256 == tuple(map(_sha256, sources))
            )
        except (FileNotFoundError, ValueError):
            return None
        return facts if current else None

    def remove_leftovers(self) -> None:
        """Delete what killed attempts left. One that is still alive fails at its rename, without harm."""
        leftover = re.compile(re.escape(f".{self.prefix.name}.") + r"(bin|idx)\.[0-9a-f]{8}\.tmp")
        for path in self.prefix.parent.iterdir():
            if leftover.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def publish(self, facts: Encoded) -> None:
        """Put the attempt in place of what was there; from the first line to the last nothing is loadable."""
        self.path("idx").unlink(missing_ok=True)
        self.bin_attempt.replace(self.path("bin"))
        write_atomically(self.path("json"), facts.to_json())
        self.idx_attempt.replace(self.path("idx"))
        sync_directory(self.prefix.parent)


def encode(
    sources: Sequence[Path], prefix: Path, encoder: TextEncoder, skip_malformed: bool = False
) -> tuple[Encoded, bool]:
    """Encode JSONL files into one `prefix`.bin/.idx/.json; also tells whether a finished output was kept.

    Raises ValueError at the first malformed line, unless those are skipped; then nothing has changed.
    """
    output = Output(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    kept = output.finished(sources, encoder, skip_malformed)
    if kept is not None:
        return kept, True
    output.remove_leftovers()
    try:
        facts = _write_attempt([Source(path, skip_malformed) for path in sources], output, encoder)
        output.publish(facts)
    finally:
        output.bin_attempt.unlink(missing_ok=True)
        output.idx_attempt.unlink(missing_ok=True)
    return facts, False


def _write_attempt(sources: Sequence[Source], output: Output, encoder: TextEncoder) -> Encoded:
    with warnings.catch_warnings():  # megatron names every optional part that it does not find
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # seconds, for torch

    dtype = DType.optimal_dtype(encoder.vocabulary_size)
    builder = IndexedDatasetBuilder(str(output.bin_attempt), dtype=dtype)
    documents = tokens = text_bytes = 0
    for source in sources:
        progress = Progress(source)
        for texts, size in batches(source):
            added = _add(builder, encoder.encode(texts, dtype))
            documents += len(texts)
            tokens += added
            text_bytes += size
            progress.show(added)
        progress.show(0, last=True)
    builder.finalize(str(output.idx_attempt))
    if not documents:  # an empty .bin cannot be mapped into memory
        raise ValueError(f"no document in {', '.join(str(source.path) for source in sources)}")
    return Encoded(
        sources_sha256=tuple(source.sha256 for source in sources),
        tokenizer_sha256=encoder.sha256,
        bin_sha256=_sha256(output.bin_attempt, durable=True),
        idx_sha256=_sha256(output.idx_attempt, durable=True),
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        skipped_lines=sum(source.skipped for source in sources),
        vocabulary_size=encoder.vocabulary_size,
        end_of_document=encoder.end_of_document,
        dtype=np.dtype(dtype).name,
    )


def _add(builder: IndexedDatasetBuilder, documents: list[np.ndarray]) -> int:
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    return sum(map(len, documents))


def _sha256(path: Path, durable: bool = False) -> str:
    with path.open("rb") as stream:
        if durable:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _train_command(arguments: argparse.Namespace) -> None:
    size = train(arguments.sources, arguments.output, arguments.vocabulary)
    _tell({"tokenizer": str(arguments.output), "vocabulary_size": size})


def _encode_command(arguments: argparse.Namespace) -> None:
    encoder = TextEncoder(arguments.tokenizer, arguments.end_of_document)
    facts, kept = encode(arguments.sources, arguments.output, encoder, arguments.skip_malformed)
    if facts.skipped_lines:
        sys.stderr.write(f"{facts.skipped_lines} malformed lines left out\n")
    _tell({"prefix": str(arguments.output), "kept": kept, **asdict(facts)})


def _tell(result: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parallelism.tokenize", description="Text to tokens.")
    commands = parser.add_subparsers(required=True)
    trainer = commands.add_parser("train", help="train a byte-level BPE")
    trainer.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    trainer.add_argument("--vocabulary", type=int, default=8192)
    trainer.set_defaults(run=_train_command)
    encoder = commands.add_parser("encode", help="turn JSON lines into Megatron's .bin/.idx")
    encoder.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="where .bin, .idx and .json go"
    )
    encoder.add_argument("--tokenizer", type=Path, required=True)
    encoder.add_argument("--end-of-document", default=END_OF_DOCUMENT, metavar="TOKEN")
    encoder.add_argument("--skip-malformed", action="store_true", help="leave out and count bad lines")
    encoder.set_defaults(run=_encode_command)
    for command in (trainer, encoder):
        command.add_argument("sources", type=Path, nargs="+", metavar="TEXT.jsonl")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, 2 bad input."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
