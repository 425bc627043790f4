"""Messages come as they went, or the link is lost: nothing in between."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints.replication.throttle import SLICE
from checkpoints.replication.wire import GREETING, Channel, Lost

Pair = tuple[Channel, Channel]
JSON = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text() | st.lists(st.booleans()))


@pytest.fixture
def pipes() -> Iterator[Callable[[], Pair]]:
    opened: list[int] = []

    def make() -> Pair:
        (a, b), (c, d) = os.pipe(), os.pipe()
        opened.extend((a, b, c, d))
        return Channel(a, d, 5.0), Channel(c, b, 5.0)

    yield make
    for descriptor in opened:
        with_closed(descriptor)


def with_closed(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        return


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(st.lists(st.tuples(JSON, st.binary(max_size=2000)), max_size=4))
def test_messages_come_as_they_went(
    pipes: Callable[[], Pair], messages: list[tuple[dict[str, object], bytes]]
) -> None:
    one, two = pipes()
    one.greet()
    two.await_greeting()
    for fields, data in messages:
        one.send(fields, data)
    for fields, data in messages:
        assert two.receive() == (fields, data)


def test_more_than_a_pipe_holds_is_throttled_slice_by_slice(pipes: Callable[[], Pair]) -> None:
    one, two = pipes()
    data, out, came = os.urandom(3 * SLICE + 7), [], []
    one.throttle, two.throttle = out.append, came.append
    thread = threading.Thread(target=one.send, args=({}, data))
    thread.start()
    assert two.receive() == ({}, data)
    thread.join()
    assert out == [SLICE, SLICE, SLICE, 7]
    assert sum(came) == len(data)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "the other side has ended"),
        (b"\0\0\0\2\0\0\0\1{}", "the other side has ended"),
        (b"\xff" * 8, "no message"),
        (b"\0\0\0\2\0\0\0\0[]", "no message"),
        (b"\0\0\0\2\0\0\0\0{x", "no message"),
        (b"\0\0\0\2\0\0\0\0\xff\xfe", "no message"),
    ],
)
def test_what_is_no_message_is_a_lost_link(pipes: Callable[[], Pair], sent: bytes, why: str) -> None:
    one, two = pipes()
    os.write(one.sink, sent)
    os.close(one.sink)
    with pytest.raises(Lost, match=why):
        two.receive()


def test_a_silent_link_is_lost_after_a_while_in_both_directions(pipes: Callable[[], Pair]) -> None:
    one, two = pipes()
    one.patience = two.patience = 0.05
    with pytest.raises(Lost, match="nothing moved"):
        two.receive()
    with pytest.raises(Lost, match="nothing moved"):
        one.send({}, bytes(1 << 20))  # more than a pipe holds


def test_a_broken_pipe_is_a_lost_link(pipes: Callable[[], Pair]) -> None:
    one, two = pipes()
    os.close(two.source)
    with pytest.raises(Lost, match="Broken pipe"):
        one.send({})


def test_a_greeting_is_found_in_chatter(pipes: Callable[[], Pair]) -> None:
    one, two = pipes()
    os.write(one.sink, b"Welcome to the machine\n" + GREETING[:-3] + b"\n" + GREETING)
    two.await_greeting()
    one.send({"a": 1})
    assert two.receive()[0] == {"a": 1}
