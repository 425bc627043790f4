"""Logs that came home are shown line by line, the chosen ones only, and followed to the run's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import logs
from orchestrator.home import RunFolder
from tests.orchestrator.story import A, B, key


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def write(folder: RunFolder, site: str, name: str, text: str, sequence: int = 0) -> None:
    """Append to a log, as the coordinator does with what a site told."""
    home = folder.logs(site, key(site, sequence))
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{name}.log").open("a") as stream:
        stream.write(text)


def shown(
    folder: RunFolder,
    site: str | None = None,
    rank: int | None = None,
    ended: Callable[[], bool] | None = None,
) -> list[str]:
    return [line.removeprefix("trial-abc234.") for line in logs.lines(folder, site, rank, ended)]


def test_every_line_says_where_it_comes_from(folder: RunFolder) -> None:
    write(folder, A, "rank-0000", "one\ntwo\n")
    write(folder, A, "supervisor", "three\n")
    write(folder, B, "rank-0000", "four\n", sequence=1)
    assert shown(folder) == [
        "local-a.0000 rank-0000 | one",
        "local-a.0000 rank-0000 | two",
        "local-a.0000 supervisor | three",
        "local-b.0001 rank-0000 | four",
    ]


@pytest.mark.parametrize(
    ("site", "rank", "expected"),
    [
        (
            A,
            None,
            ["local-a.0000 rank-0000 | a0", "local-a.0000 rank-0001 | a1", "local-a.0000 supervisor | as"],
        ),
        (None, 1, ["local-a.0000 rank-0001 | a1", "local-b.0000 rank-0001 | b1"]),
        (B, 1, ["local-b.0000 rank-0001 | b1"]),
    ],
)
def test_a_site_or_a_rank_may_be_chosen(
    folder: RunFolder, site: str | None, rank: int | None, expected: list[str]
) -> None:
    for where, name, text in (
        (A, "rank-0000", "a0\n"), (A, "rank-0001", "a1\n"), (A, "supervisor", "as\n"),
        (B, "rank-0001", "b1\n"),
    ):  # fmt: skip
        write(folder, where, name, text)
    assert shown(folder, site, rank) == expected


@pytest.mark.parametrize(
    ("site", "rank", "wanted"),
    [(None, None, "site any, rank any"), (B, None, "site local-b, rank any"), (None, 7, "site any, rank 7")],
)
def test_nothing_there_is_one_clear_line(
    folder: RunFolder, site: str | None, rank: int | None, wanted: str
) -> None:
    write(folder, A, "rank-0000", "one\n")
    if site is None and rank is None:
        folder = RunFolder(folder.root / "none")
    with pytest.raises(ValueError, match=f"{folder.root}/logs: no logs of {wanted} yet"):
        shown(folder, site, rank)


def test_an_empty_log_is_there(folder: RunFolder) -> None:
    write(folder, A, "rank-0000", "")
    assert shown(folder) == []


def test_a_last_line_without_its_end_is_shown(folder: RunFolder) -> None:
    """A killed rank may not have finished it, and it tells most."""
    write(folder, A, "rank-0000", "one\nFatal: ou")
    assert shown(folder) == ["local-a.0000 rank-0000 | one", "local-a.0000 rank-0000 | Fatal: ou"]


def test_bytes_that_are_no_text_are_shown_as_such(folder: RunFolder) -> None:
    write(folder, A, "rank-0000", "")
    (folder.logs(A, key(A)) / "rank-0000.log").write_bytes(b"x\xffy\n")
    assert shown(folder) == ["local-a.0000 rank-0000 | x\ufffdy"]


def test_following_shows_growing_files_line_by_line(folder: RunFolder, naps: list[float]) -> None:
    written = iter(["one\ntw", "o\n", "", "three\n", "fou"])
    seen: list[str] = []
    seen_before: list[int] = []

    def ended() -> bool:
        """Asked before each look: the last one comes after the end, so that nothing is missed."""
        seen_before.append(len(seen))
        text = next(written)
        write(folder, A, "rank-0000", text)
        return text == "fou"

    for line in logs.lines(folder, None, None, ended):
        seen.append(line.split(" | ")[1])  # noqa: PERF401 - as they come
    assert seen == ["one", "two", "three", "fou"]
    assert seen_before == [0, 1, 2, 2, 3]
    assert naps == [0.5] * 4


def test_following_begins_before_there_is_anything(folder: RunFolder) -> None:
    seen: list[int] = []

    def ended() -> bool:
        seen.append(len(seen))
        if len(seen) == 3:
            write(folder, A, "rank-0000", "late\n")
            write(folder, B, "rank-0000", "too\n")
        return len(seen) > 3

    assert [line.split(" | ")[1] for line in shown(folder, ended=ended)] == ["late", "too"]


def test_following_a_run_that_ended_without_logs_says_so(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="no logs of site any, rank any yet"):
        shown(folder, ended=lambda: True)
