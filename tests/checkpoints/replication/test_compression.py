"""Nothing is lost in compression, weights shrink by what their exponents hold, and garbage is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.replication import compression
from checkpoints.replication.compression import RAW, Encoded, Garbled, Wish, decode, encode
from tests.checkpoints.samples import as_bf16, weights

ALWAYS = Wish("always")
WIDTH = st.sampled_from([1, 2, 4, 8])


def round_trip(data: bytes, width: int) -> bytes:
    return bytes(decode(Encoded("", f"planes-{width}", compression.compress(data, width)), len(data)))


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3000), WIDTH)
def test_every_byte_comes_back(pattern: bytes, times: int, width: int) -> None:
    data = pattern * times
    assert round_trip(data, width) == data


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [0, 1, compression._SEGMENT, compression._SEGMENT * 10 + 7])
def test_segments_meet_without_a_seam(width: int, size: int) -> None:
    """Ten segments: a plane that did not shrink is tried again within them."""
    noise = np.random.default_rng(size).bytes(size // 2)
    data = noise + bytes(size - len(noise))
    assert round_trip(data, width) == data


def ratio(data: bytes, width: int) -> float:
    return len(data) / len(compression.compress(data, width))


def test_weights_shrink_by_what_their_exponents_hold() -> None:
    values = weights(1 << 20)
    # the entropy of sign and mantissa is their size; that of the exponents 2.57 bits: 16/10.57 and 32/26.57
    assert ratio(as_bf16(values).tobytes(), 2) == pytest.approx(1.51, abs=0.01)
    assert ratio(values.tobytes(), 4) == pytest.approx(1.20, abs=0.01)


def test_what_does_not_shrink_travels_as_it_is() -> None:
    noise = np.random.default_rng(1).bytes(5000)
    assert encode(noise, "n", 1, ALWAYS).codec == RAW
    assert encode(bytes(5000), "n", 1, ALWAYS).codec == "planes-1"
    assert encode(bytes(5000), "n", 1, Wish("never")).codec == RAW


def test_compression_is_chosen_where_the_link_is_slower_than_the_compressor() -> None:
    data = as_bf16(weights(1 << 21)).tobytes()
    assert encode(data, "n", 2, Wish("auto", rate=1e6)).codec == "planes-2"  # 1 MB/s: four seconds
    assert encode(data, "n", 2, Wish("auto", rate=1e12)).codec == RAW
    assert encode(data, "n", 2, Wish("auto")).codec == RAW  # nothing is known of the link yet
    noise = np.random.default_rng(1).bytes(1 << 22)
    assert encode(noise, "n", 2, Wish("auto", rate=1e3)).codec == RAW


GOOD = compression.compress(as_bf16(weights(5000)).tobytes(), 2)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_a_flipped_bit_gives_other_bytes_or_is_refused(position: int, bit: int) -> None:
    """Never another error: what comes over a link may be anything."""
    wrong = bytearray(GOOD)
    wrong[position] ^= 1 << bit
    try:
        found = decode(Encoded("", "planes-2", wrong), 10_000)
    except Garbled:
        return
    assert len(found) == 10_000


@given(st.binary(max_size=60), st.sampled_from([RAW, "planes-1", "planes-2", "planes-8", "pickle"]))
def test_any_bytes_are_refused_or_have_the_size(payload: bytes, codec: str) -> None:
    try:
        found = decode(Encoded("", codec, payload), 40)
    except Garbled:
        return
    assert len(found) == 40


@pytest.mark.parametrize("size", [0, 9_999, 10_001, 10_002, 1 << 40])
def test_another_size_is_refused_before_memory_is_taken(size: int) -> None:
    if size < 1 << 40:
        with pytest.raises(Garbled):
            decode(Encoded("", "planes-2", GOOD), size)
    bomb = compression.zstandard.compress(bytes(1 << 24))
    payload = compression._HEAD.pack(len(bomb)) + bomb
    with pytest.raises(Garbled, match="another size"):
        decode(Encoded("", "planes-1", payload), 1000)
