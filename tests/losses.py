"""A training as it was printed: every step with its loss, to compare two of them bit for bit."""

from __future__ import annotations

from clusters import events as site_kinds
from orchestrator.store import Store


def losses(store: Store, run: str) -> list[tuple[int, float]]:
    """Steps in the order they became known, each with its loss."""
    told = store.events(run, kinds=[site_kinds.STEP])
    return [(event.facts["step"], event.facts["loss"]) for event in told]


def assert_same_training(chain: list[tuple[int, float]], whole: list[tuple[int, float]]) -> None:
    """No step lost, none repeated, every loss the same to the last bit."""
    assert [step for step, _ in whole] == list(range(1, len(whole) + 1))
    assert [step for step, _ in chain] == [step for step, _ in whole]
    different = [
        (step, one, other) for (step, one), (_, other) in zip(chain, whole, strict=True) if one != other
    ]
    assert different == []
