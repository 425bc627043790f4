"""What is typed about a run: an operator's word on a node."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.cli import main
from orchestrator.desk import Desk
from orchestrator.exclusion import excluded
from tests.orchestrator.story import RUN, A, Story, tell


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A run that keeps away from n2."""
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path))
    story = Story().intend(A).job(A, "running", nodes="n[1-2]")
    story.add(site_kinds.NODE_LOST, at=A, host="n2", reason="gone")
    desk = Desk.open()
    tell(desk.store, story)
    return desk


def typed(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_a_node_is_trusted_again_and_the_word_is_logged(desk: Desk) -> None:
    done = typed("trust", A, "n2")
    assert (done.exit_code, done.output) == (0, f"{RUN}: {A} may use n2 again\n")
    last = list(desk.store.events(RUN))[-1]
    assert (last.kind, last.facts) == (kinds.NODE_TRUSTED, {"site": A, "node": "n2"})
    assert excluded(desk.state(RUN).islands[A], last.received) == {}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((A, "n3"), f"n3 is no node of {A} to be trusted again; its segments keep away from n2"),
        (("local-c", "n2"), "unknown site 'local-c'"),
    ],
)
def test_what_is_not_excluded_cannot_be_trusted_again(desk: Desk, words: tuple[str, str], why: str) -> None:
    done = typed("trust", *words)
    assert done.exit_code == 2
    assert why in done.output
    assert not [e for e in desk.store.events(RUN) if e.kind == kinds.NODE_TRUSTED]
