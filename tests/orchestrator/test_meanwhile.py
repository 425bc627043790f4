from __future__ import annotations

import threading
import time

import pytest

from orchestrator.meanwhile import meanwhile


def test_it_is_called_again_and_again_and_not_afterwards() -> None:
    calls: list[str] = []
    third = threading.Event()

    def act() -> None:
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            third.set()

    with meanwhile(act, 0.01):
        assert third.wait(20)
    done = len(calls)
    time.sleep(0.05)
    assert len(calls) == done
    assert threading.current_thread().name not in calls


def test_it_ends_also_when_the_large_thing_fails() -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match="large"), meanwhile(lambda: None, 60.0):
        raise OSError("large")
    assert threading.active_count() == before
