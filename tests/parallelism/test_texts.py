"""Reading JSON lines: what counts as a document, and how a bad line is reported."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallelism import texts
from parallelism.texts import Progress, Source, batches, parse_document

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
BAD_LINES = {
    b"{": "not JSON",
    b"": "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'["text"]': 'no string "text"',
    b'{"body": "a"}': 'no string "text"',
    b'{"text": 7}': 'no string "text"',
    rb'{"text": "\ud83c"}': "half a surrogate pair",
}


@given(TEXT, st.booleans())
def test_any_text_is_read_as_it_was_written(text: str, ascii_only: bool) -> None:
    line = json.dumps({"text": text, "language": "mt"}, ensure_ascii=ascii_only).encode()
    assert parse_document(line) == text


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_document_is_refused_with_its_reason(line: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_document(line)


def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": 7}\n')
    with pytest.raises(ValueError, match=r"mixed\.jsonl, line 3: no string \"text\"; allowed is"):
        list(Source(path))


def test_malformed_lines_are_counted_when_they_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n \n{"text": ""}\n{"text": "no line feed"}')
    source = Source(path, skip_malformed=True)
    assert list(source) == ["a", "", "no line feed"]
    assert source.skipped == 1
    assert source.bytes_read == path.stat().st_size
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.lists(TEXT), st.integers(1, 50))
def test_batches_keep_every_text_and_stop_at_the_limit(given: list[str], limit: int) -> None:
    groups = list(batches(given, limit))
    assert [text for group, _ in groups for text in group] == given
    for group, size in groups:
        assert size == sum(len(text.encode()) for text in group)
        assert sum(len(text.encode()) for text in group[:-1]) < limit
    assert all(size >= limit for _, size in groups[:-1])


def test_progress_is_told_every_two_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 1_000_000)
    source = Source(path)
    clock = iter([100.0, 101.9, 102.0, 103.9, 103.9])
    monkeypatch.setattr(texts.time, "monotonic", lambda: next(clock))
    progress = Progress(source)
    source.bytes_read = 7_000_000
    for _ in range(3):
        progress.show(1000)
    assert capsys.readouterr().err == f"{path}: 7.0 of 14.0 MB, 3.5 MB/s, 2000 tokens\n"
    progress.show(0, last=True)
    assert capsys.readouterr().err == f"{path}: 7.0 of 14.0 MB, 1.8 MB/s, 3000 tokens\n"
