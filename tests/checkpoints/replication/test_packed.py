"""A store of packs gives back what it got, also after kills, and after damage to anything in it."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from checkpoints.manifest import MANIFEST, Damaged, load
from checkpoints.replication.compression import Encoded, Mode
from checkpoints.replication.flat import FlatSource
from checkpoints.replication.packed import INDEX, PackSource, PackTarget
from checkpoints.replication.packs import HEAD_BYTES, Pack, Store
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.transfer import Options, Outcome, Tell, replicate
from tests.checkpoints.samples import checkpoint, files, flip, weights

LARGEST = 100_000
PACK = 400_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "here", {f"t{n}": weights(9_000 + 500 * n, n) for n in range(24)})


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store"
    else:
        name = f"memory://{uuid.uuid4().hex}/store"
        yield name
        fsspec.filesystem("memory").rm(name, recursive=True)


def put(
    source: Path, url: str, compress: Mode = "never", streams: int = 2, tell: Tell = lambda _: None
) -> Outcome:
    store = Store(url, PACK)
    target = partial(PackTarget, store, largest=LARGEST)
    return replicate(
        partial(FlatSource, source, largest=LARGEST), target, Options(streams, compress, LARGEST), tell
    )


def get(url: str, directory: Path, streams: int = 2) -> Outcome:
    target = partial(FlatTarget, directory, largest=LARGEST)
    return replicate(partial(PackSource, url), target, Options(streams, "never", LARGEST))


def packs(url: str) -> dict[str, int]:
    fs, root = fsspec.core.url_to_fs(url)
    return {e["name"]: e["size"] for e in fs.ls(f"{root}/packs", detail=True) if e["name"].endswith(".pack")}


@pytest.mark.parametrize("compress", ["never", "always"])
def test_what_is_stored_comes_back(source: Path, url: str, tmp_path: Path, compress: Mode) -> None:
    outcome = put(source, url, compress)
    assert (outcome.sent, outcome.repaired) == (outcome.bytes, 0)
    back = get(outcome.where, tmp_path / "back")
    assert files(Path(back.where)) == files(source)
    assert Path(back.where).name == source.name
    assert back.carried == outcome.carried, "it travels as it was stored"
    sizes = packs(url).values()
    assert max(sizes) < PACK + LARGEST + HEAD_BYTES
    assert len(sizes) <= outcome.carried // PACK + 2


def test_the_newest_of_a_store_is_taken(source: Path, url: str, tmp_path: Path) -> None:
    newer = checkpoint(tmp_path / "here", {"x": weights(70)}, step=12)
    for path in (newer, source):
        put(path, url)
    assert files(Path(get(url, tmp_path / "back").where)) == files(newer)
    with pytest.raises(ValueError, match="holds no checkpoint called step-00000099"):
        PackSource(url, "step-00000099.0001")


def test_chunks_of_all_checkpoints_are_shared(source: Path, url: str, tmp_path: Path) -> None:
    put(source, url)
    tensors = {f"t{n}": weights(9_000 + 500 * n, 99 if n == 3 else n) for n in range(24)}
    later = checkpoint(tmp_path / "here", tensors, step=2)
    outcome = put(later, url)
    assert 0 < outcome.sent <= 2 * LARGEST
    assert files(Path(get(url, tmp_path / "back").where)) == files(later)
    again = put(later, url)
    assert (again.already, again.carried) == (True, 0)


class Killed(Exception):
    pass


def kill_at(share: float) -> Tell:
    def tell(outcome: Outcome) -> None:
        if outcome.sent + outcome.reused > share * outcome.bytes:
            raise Killed

    return tell


def test_a_copy_that_was_cut_off_is_gone_on_with(
    source: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it: no index was written."""

    def finish(self: Pack) -> None:
        self.is_finished = True
        self._stream.close()

    with monkeypatch.context() as patch:
        patch.setattr(Pack, "finish", finish)
        with pytest.raises(Killed):
            put(source, url, tell=kill_at(0.6))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        PackSource(url)
    outcome = put(source, url)
    assert outcome.sent <= 0.45 * outcome.bytes
    assert files(Path(get(url, tmp_path / "back").where)) == files(source)


def pack_paths(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "store" / "packs").glob("*.pack"))


@pytest.fixture
def stored(source: Path, tmp_path: Path) -> str:
    """In files, so that they can be damaged: packs, but no checkpoint yet."""
    url = f"file://{tmp_path}/store"
    with pytest.raises(Killed):
        put(source, url, streams=1, tell=kill_at(0.9))
    return url


@pytest.mark.parametrize("content", ["", "[", "[]", '[{"key": 1}]', "null", "delete", "shorten"])
def test_an_index_that_is_torn_is_not_needed(source: Path, stored: str, tmp_path: Path, content: str) -> None:
    for index in (tmp_path / "store" / "packs").glob("*.index"):
        rows = json.loads(index.read_text())
        index.unlink() if content == "delete" else index.write_text(
            json.dumps(rows[:1]) if content == "shorten" else content
        )
    outcome = put(source, stored)
    assert outcome.sent < 0.15 * outcome.bytes
    assert files(Path(get(stored, tmp_path / "back").where)) == files(source)


def test_a_record_that_was_cut_off_is_not_trusted(source: Path, stored: str, tmp_path: Path) -> None:
    path = pack_paths(tmp_path)[0]
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    outcome = put(source, stored)
    assert outcome.sent < 0.15 * outcome.bytes + LARGEST
    assert files(Path(get(stored, tmp_path / "back").where)) == files(source)


@pytest.mark.parametrize("position", [3, 20, 50, 75, HEAD_BYTES - 1, HEAD_BYTES + 5])
def test_a_flipped_bit_in_a_pack_costs_what_it_hides_at_most(
    source: Path, stored: str, tmp_path: Path, position: int
) -> None:
    path = pack_paths(tmp_path)[0]
    flip(path, position)
    path.with_suffix(".index").unlink()
    outcome = put(source, stored)
    hidden = LARGEST if position >= HEAD_BYTES else path.stat().st_size
    assert outcome.sent < 0.15 * outcome.bytes + hidden
    assert files(Path(get(stored, tmp_path / "back").where)) == files(source)


def test_damage_in_a_store_is_found_when_it_is_read_and_repaired_by_another_copy(
    source: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/store"
    put(source, url)
    flip(pack_paths(tmp_path)[1], HEAD_BYTES + 100)
    with pytest.raises(Damaged, match="are not the chunk of writer-0000"):
        get(url, tmp_path / "back")
    outcome = put(source, url)
    assert not outcome.already
    assert 0 < outcome.sent <= LARGEST
    assert files(Path(get(url, tmp_path / "back").where)) == files(source)


def test_a_list_of_chunks_that_is_damaged_is_told(source: Path, tmp_path: Path) -> None:
    put(source, f"file://{tmp_path}/store")
    (folder,) = (tmp_path / "store").glob("step-*")
    whole = json.loads((folder / INDEX).read_text())
    for content in ("", "{}", json.dumps({**whole, "chunks": whole["chunks"][1:]})):
        (folder / INDEX).write_text(content)
        with pytest.raises(Damaged, match="does not list its chunks"):
            PackSource(f"file://{folder}")
    (folder / MANIFEST).write_text("torn")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        PackSource(f"file://{tmp_path}/store")


def test_what_a_store_gives_back_otherwise_is_written_again(source: Path, url: str, tmp_path: Path) -> None:
    flipped = False

    class Rotting(PackTarget):
        def write(self, index: int, sent: Encoded) -> None:
            nonlocal flipped
            if index == 2 and not flipped:
                flipped = True
                sent = Encoded(sent.name, sent.codec, bytes(len(sent.payload)))
            super().write(index, sent)

    store = Store(url, PACK)
    outcome = replicate(
        partial(FlatSource, source, largest=LARGEST), partial(Rotting, store, largest=LARGEST),
        Options(2, "never", LARGEST),
    )  # fmt: skip
    assert outcome.repaired == 1
    assert files(Path(get(url, tmp_path / "back").where)) == files(source)


@pytest.mark.parametrize("url", ["nosuch://x/y", "s3://bucket/x"])
def test_what_cannot_be_opened_is_told_in_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(ValueError, match=url) as caught:
        Store(url)
    assert "\n" not in str(caught.value)


def test_a_limit_counts_what_goes_out(source: Path, url: str) -> None:
    gone: list[int] = []
    store = Store(url, PACK)
    target = partial(PackTarget, store, gone.append, LARGEST)
    replicate(partial(FlatSource, source, largest=LARGEST), target, Options(2, "never", LARGEST))
    assert sum(gone) == load(source).bytes
