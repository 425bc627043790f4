"""Text to tokens and back: lossless, the same bytes every time, and never half a file."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from parallelism import tokenize
from parallelism.tokenize import END_OF_DOCUMENT, Encoded, Output, TextEncoder, encode, main, train

SCRIPTS = (
    "Les îles d'Aran, 3 juillet: 1\u202f234,56 €\n\n\tfin",
    "Всички хора се раждат свободни и равни по достойнство и права.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "ყველა ადამიანი იბადება თავისუფალი",
    "すべての人間は、生まれながらにして自由であり、",
    "모든 인간은 태어날 때부터 자유로우며 인간이라고 불리는",
    "كل الناس يولدون أحراراً متساوين في الكرامة",
    "כל בני האדם נולדו בני חורין",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "🏳️‍🌈 👩🏽‍🔬 e\u0301 \u200f\u0000\ufeff\U0010ffff",
    f"a document that quotes {END_OF_DOCUMENT} goes on after it",
    "",
    " \r\n ",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = write(folder / "text.jsonl", SCRIPTS * 3)
    train([text], folder / "tokenizer.json", 600)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def encoder(tokenizer: Path) -> TextEncoder:
    return TextEncoder(tokenizer)


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def decoded(prefix: Path, tokenizer: Path) -> list[str]:
    """The documents, as Megatron reads them; each must end with the end of document, once."""
    dataset = IndexedDataset(str(prefix))
    vocabulary = Tokenizer.from_file(str(tokenizer))
    end = vocabulary.token_to_id(END_OF_DOCUMENT)
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    texts = []
    for i in range(len(dataset)):
        ids = dataset[i].tolist()
        assert [place for place, token in enumerate(ids) if token == end] == [len(ids) - 1]
        texts.append(vocabulary.decode(ids[:-1], skip_special_tokens=False))
    return texts


def test_every_document_comes_back_as_it_was(tmp_path: Path, tokenizer: Path, encoder: TextEncoder) -> None:
    facts, kept = encode([write(tmp_path / "text.jsonl", SCRIPTS)], tmp_path / "out" / "text", encoder)
    assert decoded(tmp_path / "out" / "text", tokenizer) == list(SCRIPTS)
    assert not kept
    assert facts.documents == len(SCRIPTS)
    assert facts.text_bytes == sum(len(text.encode()) for text in SCRIPTS)
    dataset = IndexedDataset(str(tmp_path / "out" / "text"))
    assert facts.tokens == dataset.sequence_lengths.sum()
    assert facts.dtype == "uint16"
    assert facts.end_of_document == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text.bin", "text.idx", "text.json"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_ids_of_any_text_decode_to_it(encoder: TextEncoder, texts: list[str]) -> None:
    for ids, text in zip(encoder.encode(texts, np.uint16), texts, strict=True):
        assert ids[-1] == encoder.end_of_document
        assert encoder._tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_training_twice_gives_the_same_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    text = write(tmp_path / "text.jsonl", SCRIPTS * 3)
    size = train([text], tmp_path / "again.json", 600)
    assert (tmp_path / "again.json").read_bytes() == tokenizer.read_bytes()
    assert size == 600
    assert Tokenizer.from_file(str(tokenizer)).token_to_id(END_OF_DOCUMENT) == 0


def test_a_bad_line_of_the_training_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nb\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON"):
        train([tmp_path / "bad.jsonl"], tmp_path / "tokenizer.json", 600)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_vocabulary_that_cannot_hold_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary of 256: allowed is 257 or more"):
        train([write(tmp_path / "text.jsonl", SCRIPTS)], tmp_path / "tokenizer.json", 256)


def test_a_text_without_documents_is_refused(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no document in .*empty\.jsonl"):
        encode([tmp_path / "empty.jsonl"], tmp_path / "empty", encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_big_vocabularies_take_four_bytes_a_token(tmp_path: Path, tokenizer: Path) -> None:
    big = Tokenizer.from_file(str(tokenizer))
    big.add_tokens([f"<unused {number}>" for number in range(70_000)])
    big.save(str(tmp_path / "big.json"))
    text = write(tmp_path / "text.jsonl", ["see <unused 69999>"])
    facts, _ = encode([text], tmp_path / "text", TextEncoder(tmp_path / "big.json"))
    assert facts.dtype == "int32"
    assert facts.vocabulary_size == 70_600
    assert decoded(tmp_path / "text", tmp_path / "big.json") == ["see <unused 69999>"]
    dataset = IndexedDataset(str(tmp_path / "text"))  # its rows are views that die with it
    assert dataset[0].max() > 65_535


def test_the_end_of_document_must_be_in_the_vocabulary(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: has no token '</s>'"):
        TextEncoder(tokenizer, "</s>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        TextEncoder(tmp_path / "tokenizer.json")


class TestResuming:
    """A finished output is kept exactly as long as encoding again would give the same."""

    @pytest.fixture
    def text(self, tmp_path: Path, encoder: TextEncoder) -> Path:
        text = write(tmp_path / "text.jsonl", SCRIPTS)
        encode([text], tmp_path / "text", encoder)
        return text

    def test_the_same_text_is_not_encoded_again(self, text: Path, encoder: TextEncoder) -> None:
        before = text.with_suffix(".idx").stat()
        _, kept = encode([text], text.with_suffix(""), encoder)
        assert kept
        assert text.with_suffix(".idx").stat().st_mtime_ns == before.st_mtime_ns

    def test_other_text_is(self, text: Path, tokenizer: Path, encoder: TextEncoder) -> None:
        write(text, ["other"])
        _, kept = encode([text], text.with_suffix(""), encoder)
        assert not kept
        assert decoded(text.with_suffix(""), tokenizer) == ["other"]

    @pytest.mark.parametrize("end", ["bin", "idx", "json"])
    @pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: flip_a_bit(path)])
    def test_damage_is_repaired(self, text: Path, encoder: TextEncoder, end: str, damage: object) -> None:
        path = text.with_suffix(f".{end}")
        whole = path.read_bytes()
        damage(path)  # type: ignore[operator]
        _, kept = encode([text], text.with_suffix(""), encoder)
        assert not kept
        assert path.read_bytes() == whole

    def test_another_tokenizer_is_another_output(self, text: Path, tmp_path: Path) -> None:
        train([text], tmp_path / "small.json", 300)
        facts, kept = encode([text], text.with_suffix(""), TextEncoder(tmp_path / "small.json"))
        assert not kept
        assert facts.vocabulary_size == 300

    def test_an_output_without_the_bad_lines_is_kept_only_where_they_may_be_left_out(
        self, text: Path, encoder: TextEncoder
    ) -> None:
        text.write_text(text.read_text() + "{\n")
        facts, _ = encode([text], text.with_suffix(""), encoder, skip_malformed=True)
        assert facts.skipped_lines == 1
        assert encode([text], text.with_suffix(""), encoder, skip_malformed=True)[1]
        with pytest.raises(ValueError, match="line 15: not JSON"):
            encode([text], text.with_suffix(""), encoder)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestInterrupted:
    """Whatever happens, what can be loaded is one whole output."""

    def test_a_malformed_line_leaves_the_old_output_and_nothing_else(
        self, tmp_path: Path, tokenizer: Path, encoder: TextEncoder
    ) -> None:
        text = write(tmp_path / "text.jsonl", ["old"])
        encode([text], tmp_path / "text", encoder)
        text.write_text('{"text": "new"}\n{"text"}\n')
        with pytest.raises(ValueError, match=r"text\.jsonl, line 2"):
            encode([text], tmp_path / "text", encoder)
        assert decoded(tmp_path / "text", tokenizer) == ["old"]
        assert len(list(tmp_path.iterdir())) == 4

    @pytest.mark.parametrize("instant", range(5))
    def test_dying_between_any_two_renames(
        self,
        tmp_path: Path,
        tokenizer: Path,
        encoder: TextEncoder,
        monkeypatch: pytest.MonkeyPatch,
        instant: int,
    ) -> None:
        text = write(tmp_path / "text.jsonl", ["old, and longer than the new"])
        encode([text], tmp_path / "text", encoder)
        write(text, ["new"])
        with monkeypatch.context() as patch:
            die_after(patch, instant)
            with pytest.raises(KeyboardInterrupt):
                encode([text], tmp_path / "text", encoder)
        loadable = decoded(tmp_path / "text", tokenizer) if (tmp_path / "text.idx").exists() else None
        assert loadable == {0: ["old, and longer than the new"], 4: ["new"]}.get(instant)
        encode([text], tmp_path / "text", encoder)
        assert decoded(tmp_path / "text", tokenizer) == ["new"]

    def test_kill_9_leaves_nothing_loadable_and_the_next_run_the_right_bytes(
        self, tmp_path: Path, tokenizer: Path, encoder: TextEncoder
    ) -> None:
        text = write(tmp_path / "text.jsonl", SCRIPTS * 4000)
        reference, _ = encode([text], tmp_path / "reference", encoder)
        output = tmp_path / "out"
        command = [sys.executable, "-P", "-m", "parallelism.tokenize", "encode"]
        child = subprocess.Popen(
            [*command, "--tokenizer", str(tokenizer), "--output", str(output / "text"), str(text)],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_bytes(output, child)
        finally:
            child.kill()
        assert child.wait() == -signal.SIGKILL
        assert [path.name for path in output.iterdir() if not path.name.startswith(".")] == []
        assert encode([text], output / "text", encoder) == (reference, False)
        assert sorted(path.name for path in output.iterdir()) == ["text.bin", "text.idx", "text.json"]

    def test_leftovers_of_other_outputs_are_let_alone(self, tmp_path: Path, encoder: TextEncoder) -> None:
        mine, *others = (tmp_path / f".{name}.bin.0123abcd.tmp" for name in ("a+b", "a+b.c", "aab"))
        for path in (mine, *others):
            path.touch()
        encode([write(tmp_path / "a.jsonl", ["a"])], tmp_path / "a+b", encoder)
        assert not mine.exists()
        assert all(path.exists() for path in others)

    def test_the_later_of_two_at_once_wins_and_the_other_fails(self, tmp_path: Path) -> None:
        first, second = Output(tmp_path / "a"), Output(tmp_path / "a")
        first.bin_attempt.write_bytes(b"first")
        first.idx_attempt.write_bytes(b"first")
        second.remove_leftovers()
        with pytest.raises(FileNotFoundError):
            first.publish(Encoded((), "", "", "", 0, 0, 0, 0, 0, 0, ""))
        assert list(tmp_path.iterdir()) == []


def die_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Raise at the first change of a name after `steps` of them."""
    done = 0

    def counted(change):  # type: ignore[no-untyped-def]
        def step(path: Path, *arguments: object, **options: object) -> object:
            nonlocal done
            if ".tmp" in path.name and change is unlink:  # cleaning up the attempt is no step
                return change(path, *arguments, **options)
            if done == steps:
                raise KeyboardInterrupt
            done += 1
            return change(path, *arguments, **options)

        return step

    unlink = Path.unlink
    patch.setattr(Path, "unlink", counted(unlink))
    patch.setattr(Path, "replace", counted(Path.replace))
    patch.setattr(tokenize, "sync_directory", counted(tokenize.sync_directory))


def wait_for_bytes(folder: Path, child: subprocess.Popen[bytes], limit: float = 60.0) -> None:
    """Until the child is in the middle of writing its .bin file."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        assert child.poll() is None, "it was done before it could be killed"
        if any(path.stat().st_size for path in folder.glob(".text.bin.*")):
            return
        time.sleep(0.001)
    raise AssertionError(f"nothing was written in {limit} s")


class TestCommandLine:
    def test_train_and_encode(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        inputs = [str(write(tmp_path / "el.jsonl", SCRIPTS)), str(write(tmp_path / "bg.jsonl", ["да"]))]
        tokenizer, prefix = tmp_path / "tokenizer.json", tmp_path / "out" / "v1.2"
        assert main(["train", "--output", str(tokenizer), "--vocabulary", "300", *inputs]) == 0
        assert json.loads(capsys.readouterr().out) == {"tokenizer": str(tokenizer), "vocabulary_size": 300}
        arguments = ["encode", "--tokenizer", str(tokenizer), "--output", str(prefix)]
        assert main([*arguments, *inputs]) == 0
        printed = capsys.readouterr()
        result = json.loads(printed.out)
        assert (result["prefix"], result["kept"], result["documents"]) == (
            str(prefix),
            False,
            len(SCRIPTS) + 1,
        )
        assert re.search(r"bg\.jsonl: 0\.0 of 0\.0 MB, [\d.]+ MB/s, \d+ tokens\n", printed.err)
        assert decoded(prefix, tokenizer) == [*SCRIPTS, "да"]
        assert main([*arguments, *inputs]) == 0
        assert json.loads(capsys.readouterr().out) == {**result, "kept": True}
        assert main([*arguments, *reversed(inputs)]) == 0
        assert decoded(prefix, tokenizer) == ["да", *SCRIPTS]

    def test_malformed_lines_are_counted_aloud(
        self, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = tmp_path / "a.jsonl"
        text.write_text('{"text": "a"}\n7\n')
        arguments = ["encode", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "a"), str(text)]
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {text}, line 2: no string")
        assert main([*arguments, "--skip-malformed"]) == 0
        assert "1 malformed lines left out" in capsys.readouterr().err

    def test_a_missing_input_is_bad_input_and_a_refused_directory_a_failure(
        self, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["encode", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out" / "a")]
        assert main([*arguments, str(tmp_path / "absent.jsonl")]) == 2
        assert "absent.jsonl" in capsys.readouterr().err
        (tmp_path / "out").rmdir()
        (tmp_path / "out").touch()
        assert main([*arguments, str(write(tmp_path / "a.jsonl", ["a"]))]) == 1
        assert capsys.readouterr().err.startswith("error: ")
