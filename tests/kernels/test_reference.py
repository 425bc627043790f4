"""Quantisation by groups: bounded errors, stable codes, and nothing that depends on where a part begins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.reference import dequantise, group_maxima, pack_nibbles, quantise, unpack_nibbles

FORMS = [(8, 256), (4, 64), (8, 3), (4, 5)]
FINEST = torch.finfo(torch.float32).tiny  # below it a scale has no full precision

forms = st.sampled_from(FORMS)
phases = st.integers(0, 300)
magnitudes = st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30])


def values(rows: int, columns: int, seed: int, magnitude: float = 1.0) -> torch.Tensor:
    """Some of many sizes, some zero, and a row of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(2 * torch.randn(rows, columns, generator=generator))
    found = magnitude * sizes * torch.randn(rows, columns, generator=generator)
    found[:, ::7] = 0.0
    found[0] *= seed % 2
    return found


def there_and_back(x: torch.Tensor, bits: int, group: int, phase: int) -> tuple[torch.Tensor, ...]:
    codes, scales = quantise(x, group_maxima(x, group, phase), group, phase, bits)
    return codes, scales, dequantise(codes, scales, group, phase)


@settings(max_examples=100, deadline=None)
@given(forms, phases, st.integers(1, 3), st.integers(1, 600), st.integers(0, 99), magnitudes)
def test_no_error_exceeds_half_a_step_of_its_group(
    form: tuple[int, int], phase: int, rows: int, columns: int, seed: int, magnitude: float
) -> None:
    (bits, group), levels = form, 2 ** (form[0] - 1) - 1
    phase %= group
    x = values(rows, columns, seed, magnitude)
    codes, scales, back = there_and_back(x, bits, group, phase)
    assert codes.abs().max() <= levels
    for column in range(columns):
        number = (phase + column) // group
        members = x[:, max(0, number * group - phase) : (number + 1) * group - phase]
        step = members.abs().amax(dim=1) / levels
        assert torch.allclose(scales[:, number].float(), step, rtol=2**-8, atol=0)
        assert ((x[:, column] - back[:, column]).abs() <= 0.5 * 1.005 * step).all()


@settings(max_examples=100, deadline=None)
@given(forms, phases, st.integers(1, 600), st.integers(0, 99), magnitudes)
def test_what_codes_stand_for_has_the_same_codes(
    form: tuple[int, int], phase: int, columns: int, seed: int, magnitude: float
) -> None:
    bits, group = form
    codes, scales, back = there_and_back(values(2, columns, seed, magnitude), bits, group, phase % group)
    again = there_and_back(back, bits, group, phase % group)
    for found, expected in zip(again, (codes, scales, back), strict=True):
        assert torch.equal(found, expected)


@settings(max_examples=50, deadline=None)
@given(forms, st.integers(2, 600), st.integers(0, 99), st.data())
def test_a_part_has_the_codes_of_the_whole(
    form: tuple[int, int], columns: int, seed: int, data: st.DataObject
) -> None:
    bits, group = form
    x = values(2, columns, seed)
    whole, _, _ = there_and_back(x, bits, group, 0)
    begin = data.draw(st.integers(0, columns - 1))
    end = data.draw(st.integers(begin + 1, columns))
    maxima = group_maxima(x, group, 0)[:, begin // group : -(-end // group)]
    part, _ = quantise(x[:, begin:end], maxima, group, begin % group, bits)
    assert torch.equal(part, whole[:, begin:end])


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_what_is_zero_or_too_small_for_a_scale_stays_zero(bits: int, group: int) -> None:
    x = torch.zeros(2, 10)
    x[1] = 1e-45
    assert torch.equal(there_and_back(x, bits, group, 0)[2], torch.zeros(2, 10))


def test_not_a_number_is_not_hidden() -> None:
    x = torch.tensor([[1.0, torch.nan, 3.0]])
    assert group_maxima(x, 2, 0)[0, 0].isnan()
    assert group_maxima(x, 2, 0)[0, 1] == 3.0


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=20))
def test_nibbles_read_back(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(codes) // 2)
    assert unpack_nibbles(packed, len(codes)).tolist() == codes


def test_nibbles_lie_as_documented() -> None:
    assert pack_nibbles(torch.tensor([-8, 7, 1], dtype=torch.int8)).tolist() == [0xF0, 0x09]
