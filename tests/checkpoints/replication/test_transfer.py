"""A copy is the checkpoint bit for bit or does not exist, whatever the source, the link and the disk do."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from checkpoints import attempts
from checkpoints.attempts import Retention, superfluous, survey
from checkpoints.manifest import Damaged, load
from checkpoints.reader import Reader
from checkpoints.replication import transfer
from checkpoints.replication.chunks import cut
from checkpoints.replication.compression import Encoded, Garbled, Mode
from checkpoints.replication.flat import FlatSource
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.transfer import Options, Outcome, replicate
from tests.checkpoints.samples import as_bf16, checkpoint, files, flip, weights

LARGEST = 100_000
TENSORS = {f"t{n}": weights(9_000 + 500 * n, n) for n in range(24)}  # 24 chunks or so in two files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "here", TENSORS)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PAUSE", 0.0)


def copy(
    source: Path,
    target: Path,
    streams: int = 2,
    compress: Mode = "never",
    receiver: type[FlatTarget] = FlatTarget,
    tell: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    options = Options(streams, compress, LARGEST)
    open_target = partial(receiver, target, largest=LARGEST)
    return replicate(partial(FlatSource, source, largest=LARGEST), open_target, options, tell)


def assert_copied(source: Path, copied: Path | str) -> None:
    """An ordinary checkpoint: the same bytes, accepted by every reader, nothing beside it."""
    path = Path(copied)
    assert files(path) == files(source)
    Reader(path).verify()
    found = survey(path.parent)
    assert path in found.intact
    assert not found.damaged
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("compress", ["never", "always", "auto"])
@pytest.mark.parametrize("streams", [1, 5])
def test_a_copy_is_the_checkpoint_bit_for_bit(
    source: Path, tmp_path: Path, streams: int, compress: Mode
) -> None:
    told: list[int] = []
    outcome = copy(
        source, tmp_path / "there", streams, compress, tell=lambda o: told.append(o.sent + o.reused)
    )
    assert_copied(source, outcome.where)
    assert Path(outcome.where).name == source.name
    assert outcome.sent == outcome.bytes == load(source).bytes == told[-1]
    assert told == sorted(told)
    assert outcome.carried < 0.9 * outcome.sent if compress == "always" else outcome.carried <= outcome.sent
    assert not outcome.already


def test_what_is_there_is_read_and_not_sent_again(source: Path, tmp_path: Path) -> None:
    first = copy(source, tmp_path / "there")
    again = copy(source.parent, tmp_path / "there")  # the directory: its newest checkpoint
    assert (again.where, again.carried, again.already) == (first.where, 0, True)
    assert again.reused == again.bytes


def test_tensors_without_elements_and_empty_files(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "here", {"a": weights(0), "b": weights(3), "c": weights(0)}, writers=3)
    assert_copied(source, copy(source, tmp_path / "there").where)


def test_a_copy_that_was_cut_off_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(outcome: Outcome) -> None:
        if outcome.sent > outcome.bytes / 2:
            raise Enough

    with pytest.raises(Enough):
        copy(source, tmp_path / "there", tell=stop)
    found = survey(tmp_path / "there")
    assert found.intact == found.damaged == found.uncommitted == []
    outcome = copy(source, tmp_path / "there")
    assert outcome.sent < 0.55 * outcome.bytes
    assert outcome.sent + outcome.reused == outcome.bytes
    assert_copied(source, outcome.where)


def test_an_interrupt_ends_it_after_what_is_on_its_way(source: Path, tmp_path: Path) -> None:
    def interrupt(outcome: Outcome) -> None:
        if outcome.sent < 2 * LARGEST:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)  # a link that is not done before the interrupt arrives

    with pytest.raises(KeyboardInterrupt):
        copy(source, tmp_path / "there", tell=interrupt)
    arrived = sum(path.stat().st_blocks * 512 for path in incoming(tmp_path / "there").iterdir())
    assert 0 < arrived < 0.9 * load(source).bytes


def test_compression_is_chosen_once_the_link_turns_out_slow(tmp_path: Path) -> None:
    class Slow(FlatTarget):
        def write(self, index: int, sent: Encoded) -> None:
            time.sleep(len(sent.payload) / 1e6)
            super().write(index, sent)

    source = checkpoint(tmp_path / "here", {f"t{n}": np.full(20_000, n, "<f4") for n in range(1, 11)})
    outcome = copy(source, tmp_path / "there", 1, "auto", receiver=Slow)
    assert outcome.carried < 0.7 * outcome.bytes, "the first chunk travels as it is, the others as nothing"
    assert_copied(source, outcome.where)


def test_where_a_limit_is_known_the_first_chunk_is_compressed_too(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "here", {"t": np.full(20_000, 7, "<f4")})
    ends = (
        partial(FlatSource, source, largest=LARGEST),
        partial(FlatTarget, tmp_path / "there", largest=LARGEST),
    )
    assert replicate(*ends, Options(1, "auto", LARGEST, rate=1e4)).carried < 1000


def incoming(target: Path) -> Path:
    (path,) = target.glob(".*.incoming")
    return path


def test_whatever_was_done_to_what_has_come_only_that_is_sent_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    half = FlatTarget(target, largest=LARGEST)
    origin = FlatSource(source, largest=LARGEST)
    half.begin(origin.name, origin.text)
    chunks = cut(load(source), LARGEST)
    for index in range(len(chunks) - 2):
        half.write(index, origin.read(index, transfer.Wish()))
    half.close()
    flip(incoming(target) / chunks[0].file, 5)
    with (incoming(target) / chunks[-1].file).open("r+b") as stream:
        stream.truncate(10)
    lost = [c for c in chunks[:-2] if c.file == chunks[-1].file]
    (incoming(target) / "manifest.json").write_text("half a mani")  # killed while it was committed
    outcome = copy(source, target)
    assert outcome.sent == chunks[0].size + sum(c.size for c in (*lost, *chunks[-2:]))
    assert_copied(source, outcome.where)


def test_a_bit_that_flips_after_it_was_stored_is_found_and_that_chunk_alone_sent_again(
    source: Path, tmp_path: Path
) -> None:
    class Rotting(FlatTarget):
        flipped = False

        def write(self, index: int, sent: Encoded) -> None:
            super().write(index, sent)
            if index == 3 and not Rotting.flipped:
                Rotting.flipped = True
                chunk = self._chunks[index]
                flip(incoming(self.directory) / chunk.file, chunk.position + 77)

    outcome = copy(source, tmp_path / "there", receiver=Rotting)
    assert Rotting.flipped
    assert outcome.repaired == 1
    assert outcome.sent == outcome.bytes + cut(load(source), LARGEST)[3].size
    assert_copied(source, outcome.where)


def test_a_disk_that_never_keeps_what_it_got_ends_the_copy(source: Path, tmp_path: Path) -> None:
    class Broken(FlatTarget):
        def digest(self, index: int) -> str | None:
            return "0" * 64 if index == 3 else super().digest(index)

    with pytest.raises(OSError, match="gives back other bytes"):
        copy(source, tmp_path / "there", receiver=Broken)
    assert survey(tmp_path / "there").intact == []


@pytest.mark.parametrize("times", [1, 3])
def test_what_arrives_garbled_is_sent_again(source: Path, tmp_path: Path, times: int) -> None:
    left = [times]

    class Garbling(FlatTarget):
        def write(self, index: int, sent: Encoded) -> None:
            if index == 2 and left[0]:
                left[0] -= 1
                sent = Encoded(sent.name, sent.codec, bytes(len(sent.payload)))
            super().write(index, sent)

    outcome = copy(source, tmp_path / "there", receiver=Garbling)
    assert outcome.relinked == times
    assert_copied(source, outcome.where)


def test_a_link_that_is_lost_is_opened_again_and_given_up_in_the_end(source: Path, tmp_path: Path) -> None:
    class Failing(FlatTarget):
        left = 3
        opened = 0

        def begin(self, name: str, text: str, anew: bool = False) -> transfer.Begun:
            Failing.opened += 1
            return super().begin(name, text, anew)

        def write(self, index: int, sent: Encoded) -> None:
            if index == 5 and Failing.left:
                Failing.left -= 1
                raise ConnectionError("the link is gone")
            super().write(index, sent)

    assert_copied(source, copy(source, tmp_path / "there", 1, receiver=Failing).where)
    assert Failing.opened == 4
    Failing.left = 1000
    with pytest.raises(OSError, match="given up after 4 tries: the link is gone"):
        copy(source, tmp_path / "there2", receiver=Failing)


def test_a_lost_answer_to_the_commit_does_no_harm(source: Path, tmp_path: Path) -> None:
    class Silent(FlatTarget):
        answered = False

        def commit(self) -> str:
            where = super().commit()
            if not Silent.answered:
                Silent.answered = True
                raise ConnectionError("no answer")
            return where

    assert_copied(source, copy(source, tmp_path / "there", receiver=Silent).where)
    assert len(survey(tmp_path / "there").intact) == 1


def test_damage_at_the_source_is_found_there_and_never_copied(source: Path, tmp_path: Path) -> None:
    chunk = cut(load(source), LARGEST)[4]
    flip(source / chunk.file, chunk.position + 9)
    with pytest.raises(Damaged, match=rf"{source.name}: {chunk.file}: bytes .* have crc32c"):
        copy(source, tmp_path / "there")
    assert survey(tmp_path / "there").intact == []
    with pytest.raises(Damaged):  # also where the target had got that chunk before
        copy(source, tmp_path / "there")


def test_damage_at_the_source_is_found_even_when_the_target_has_it_all(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "there")
    flip(source / "writer-00000.bin", 9)
    with pytest.raises(Damaged, match=str(source)):
        copy(source, tmp_path / "there")


def test_a_damaged_copy_is_replaced_by_a_new_attempt_out_of_its_own_good_chunks(
    source: Path, tmp_path: Path
) -> None:
    old = Path(copy(source, tmp_path / "there").where)
    chunk = cut(load(old), LARGEST)[4]
    flip(old / chunk.file, chunk.position + 9)
    outcome = copy(source, tmp_path / "there")
    assert outcome.sent == chunk.size
    assert Path(outcome.where).name == "step-00000001.0002"
    assert_copied(source, outcome.where)
    assert (old / "manifest.json").exists(), "deleting is the operator's affair"


def test_chunks_of_other_checkpoints_at_the_target_are_taken_from_there(source: Path, tmp_path: Path) -> None:
    """Frozen tensors, or the same step brought before under another name."""
    copy(source, tmp_path / "there")
    changed = {**TENSORS, "t0": weights(9_000, 99)}
    later = checkpoint(tmp_path / "here", changed, step=2)
    outcome = copy(later, tmp_path / "there")
    assert 0 < outcome.sent < 2 * LARGEST
    assert_copied(later, outcome.where)


def test_equal_chunks_of_one_checkpoint_cross_once(tmp_path: Path) -> None:
    same = weights(20_000)
    source = checkpoint(tmp_path / "here", {f"t{n}": same for n in range(8)}, writers=1)
    outcome = copy(source, tmp_path / "there", streams=1)
    assert outcome.sent < outcome.bytes / 7
    assert_copied(source, outcome.where)


def test_another_checkpoint_of_that_name_is_left_alone(source: Path, tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "there", {"x": weights(50)})
    before = files(theirs)
    outcome = copy(source, tmp_path / "there")
    assert Path(outcome.where).name == "step-00000001.0002"
    assert files(theirs) == before
    assert_copied(source, outcome.where)


def test_an_attempt_that_somebody_has_just_begun_is_left_alone(source: Path, tmp_path: Path) -> None:
    begun = tmp_path / "there" / source.name
    begun.mkdir(parents=True)
    assert Path(copy(source, tmp_path / "there").where).name == "step-00000001.0002"
    assert list(begun.iterdir()) == []


def test_two_copies_to_one_target_at_once_do_no_harm(source: Path, tmp_path: Path) -> None:
    together = threading.Barrier(2)

    class Together(FlatTarget):
        def commit(self) -> str:
            together.wait(20)
            return super().commit()

    outcomes: list[Outcome] = []
    run = lambda: outcomes.append(copy(source, tmp_path / "there", receiver=Together))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2
    assert {o.where for o in outcomes} == {str(tmp_path / "there" / source.name)}
    assert len(survey(tmp_path / "there").intact) == 1
    assert_copied(source, outcomes[0].where)


def test_a_copy_that_another_finishes_meanwhile(source: Path, tmp_path: Path) -> None:
    """The incoming directory is renamed under the slower one's feet."""
    done = False

    def overtake(outcome: Outcome) -> None:
        nonlocal done
        if outcome.sent > outcome.bytes / 3 and not done:
            done = True
            copy(source, tmp_path / "there")

    outcome = copy(source, tmp_path / "there", streams=1, tell=overtake)
    assert done
    assert_copied(source, outcome.where)
    assert len(survey(tmp_path / "there").intact) == 1


def test_an_incoming_directory_that_vanishes_is_one_clear_error(source: Path, tmp_path: Path) -> None:
    def sabotage(outcome: Outcome) -> None:
        if outcome.sent + outcome.reused == outcome.bytes:
            shutil.rmtree(incoming(tmp_path / "there"))

    with pytest.raises(FileNotFoundError, match="removed while a checkpoint came in"):
        copy(source, tmp_path / "there", streams=1, tell=sabotage)


def test_a_target_without_room_is_refused_before_anything_is_sent(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = os.statvfs(tmp_path)
    full = os.statvfs_result([*facts[:4], 100, *facts[5:]])
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(OSError, match="GB are missing") as caught:
        copy(source, tmp_path / "there")
    assert caught.value.errno == errno.ENOSPC


def test_a_checkpoint_pruned_while_it_is_copied_is_one_clear_error(source: Path, tmp_path: Path) -> None:
    def prune(outcome: Outcome) -> None:
        if outcome.sent > outcome.bytes / 3 and source.exists():
            shutil.rmtree(source)

    with pytest.raises(Damaged, match="cannot be read: No such file"):
        copy(source, tmp_path / "there", tell=prune)
    assert survey(tmp_path / "there").intact == []


def test_retention_leaves_a_checkpoint_alone_while_it_is_copied(source: Path, tmp_path: Path) -> None:
    for step in (2, 3, 4):
        checkpoint(source.parent, {"x": weights(50)}, step)
    asked: list[list[Path]] = []
    keep = Retention(newest=2)
    copy(source, tmp_path / "there", tell=lambda _: asked.append(superfluous(source.parent, keep)))
    assert asked
    assert all(source not in gone for gone in asked)
    assert source in superfluous(source.parent, keep), "afterwards it may go"
    assert not list(source.glob(".*"))


def test_a_source_that_cannot_be_held_is_copied_all_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attempts, "hold", full)
    assert_copied(source, copy(source, tmp_path / "there").where)


def test_a_source_that_is_refused_is_not_held(source: Path) -> None:
    (source / "manifest.json").write_text("torn")
    with pytest.raises(Damaged):
        FlatSource(source)
    assert not list(source.glob(".*"))


@pytest.mark.parametrize("name", ["../evil", "", ".hidden", "a/b", "x" * 200])
def test_a_name_is_a_name(tmp_path: Path, source: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint's name"):
        FlatTarget(tmp_path / "there").begin(name, load(source).to_json())
    assert not (tmp_path / "there").exists()


def test_a_name_without_an_attempt_gets_one(tmp_path: Path, source: Path) -> None:
    plain = source.rename(source.with_name("final"))
    assert Path(copy(plain, tmp_path / "there").where).name == "final.0001"


def test_what_is_no_checkpoint_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a committed checkpoint nor a directory that holds one"):
        copy(tmp_path / "empty", tmp_path / "there")
    with pytest.raises(ValueError, match="no such directory"):
        copy(tmp_path / "absent", tmp_path / "there")


def test_a_chunk_under_a_wrong_name_is_refused(tmp_path: Path, source: Path) -> None:
    origin, target = FlatSource(source, largest=LARGEST), FlatTarget(tmp_path / "there", largest=LARGEST)
    target.begin(origin.name, origin.text)
    sent = origin.read(0, transfer.Wish("always"))
    with pytest.raises(Garbled, match="another name"):
        target.write(0, Encoded("0" * 64, sent.codec, sent.payload))
    assert target.digest(0) is None


def test_mixed_dtypes_survive_compression(tmp_path: Path) -> None:
    tensors = {"a": as_bf16(weights(9001)), "b": weights(777), "c": np.arange(9, dtype="<i8"),
               "d": np.frombuffer(b"odd bytes", "u1")}  # fmt: skip
    source = checkpoint(tmp_path / "here", tensors)
    assert_copied(source, copy(source, tmp_path / "there", compress="always").where)
