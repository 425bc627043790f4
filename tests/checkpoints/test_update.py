"""What an update says of itself, and what the controller finds out about it without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.attempts import begin, commit
from checkpoints.formats import QUANTISED, QUANTISERS
from checkpoints.manifest import Damaged, Manifest, load
from checkpoints.ranges import Box
from checkpoints.reader import QuantisedShard, Reader, Shard
from checkpoints.store import write_shards
from checkpoints.update import Header, inspect
from tests.checkpoints.test_quantised import cuttings, shapes, shards, values

HEADER = Header("run", "a", 1, "base", tokens=10, step=5, quantiser="int8", state=False, sketch={"w": [0.5]})


def written(folder: Path, parts: list[Any], header: Header = HEADER) -> Path:
    attempt = begin(folder, "update")
    write_shards(attempt, 0, parts)
    commit(attempt, 1, "update", header.to_facts())
    return attempt


def whole(tensor: torch.Tensor, form: str, name: str = "w") -> Shard:
    box = Box((0,) * tensor.dim(), tuple(tensor.shape))
    return shards(tensor, [box], form, name)[0] if form in QUANTISED else Shard(
        name, box.shape, box.offset, tensor
    )  # fmt: skip


def test_a_header_survives_the_manifest() -> None:
    manifest = Manifest("update", (), {}, HEADER.to_facts())
    assert Header.of(Manifest.from_json(manifest.to_json())) == HEADER


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("run", 5, "run is no str"),
        ("round", 0, "round cannot be 0"),
        ("round", 1.0, "round is no int"),
        ("round", True, "round is no int"),
        ("tokens", 0, "tokens cannot be 0"),
        ("step", -1, "step cannot be -1"),
        ("quantiser", "int2", "quantiser cannot be 'int2'"),
        ("state", 1, "state is no bool"),
        ("fragment", 1, "fragment cannot be 1"),
        ("sketch", [1.0], "sketch is no dict"),
        ("sketch", {"w": [1]}, "sketch cannot be {'w'"),
        ("sketch", {"w": "ab"}, "sketch cannot be {'w'"),
    ],
)
def test_odd_headers_are_refused(name: str, value: object, why: str) -> None:
    manifest = Manifest("update", (), {}, {**HEADER.to_facts(), name: value})
    with pytest.raises(ValueError, match=f"^the update's {why}") as caught:
        Header.of(manifest)
    assert "\n" not in str(caught.value)


def test_headers_with_other_fields_are_refused() -> None:
    for facts in ({}, {**HEADER.to_facts(), "colour": "red"}):
        with pytest.raises(ValueError, match=r"^the update's header lacks, or should lack, (base|colour)"):
            Header.of(Manifest("update", (), {}, facts))
    with pytest.raises(ValueError, match=r"^a receipt, not an update$"):
        Header.of(Manifest("receipt", (), {}, HEADER.to_facts()))


@settings(max_examples=30, deadline=None)
@given(st.data(), shapes, st.sampled_from(sorted(QUANTISERS)))
def test_the_norm_is_that_of_what_receivers_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: tuple[int, ...], quantiser: str
) -> None:
    tensor, form = values(shape, 3), QUANTISERS[quantiser]
    if form in QUANTISED:
        parts: list[Any] = list(shards(tensor, data.draw(cuttings(shape)), form))
    else:
        parts = [whole(tensor, form)]
    path = written(tmp_path_factory.mktemp("u"), parts, replace(HEADER, quantiser=quantiser))
    read = torch.empty(shape)
    Reader(path).read(Shard("w", shape, (0,) * len(shape), read))
    assert inspect(path, load(path)) == pytest.approx(float(read.double().norm()), rel=1e-9, abs=1e-300)


def test_the_norms_of_all_tensors_add_up_and_the_state_does_not_count(tmp_path: Path) -> None:
    a, b = torch.full((2, 300), 2.0), torch.full((5,), 1.0)
    parts = [whole(a, "int8g256", "a"), whole(b, "int8g256", "b"), whole(9 * a, "float32", "outer.base.a")]
    path = written(tmp_path, parts)
    assert inspect(path, load(path)) == pytest.approx((600 * 4 + 5) ** 0.5, rel=1e-2)


def nan(shard: QuantisedShard) -> torch.Tensor:
    stored = QuantisedShard.stored(shard)
    stored[:2] = torch.tensor([torch.nan]).bfloat16().view(torch.uint8)
    return stored


def overflowing(shard: QuantisedShard) -> torch.Tensor:
    stored = QuantisedShard.stored(shard)
    stored[:2] = torch.tensor([1e38]).bfloat16().view(torch.uint8)
    return stored


@pytest.mark.parametrize("spoil", [nan, overflowing])
@pytest.mark.parametrize("form", sorted(QUANTISED))
def test_scales_that_are_not_finite_have_no_norm(tmp_path: Path, spoil: Any, form: str) -> None:
    class Spoilt(QuantisedShard):
        def stored(self) -> torch.Tensor:
            return torch.Tensor(spoil(self))

    good = shards(values((3, 300)), [Box((0, 0), (3, 300))], form)[0]
    quantiser = next(name for name, f in QUANTISERS.items() if f == form)
    path = written(tmp_path, [Spoilt(**vars(good))], replace(HEADER, quantiser=quantiser))
    assert inspect(path, load(path)) == float("inf")


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["w", "outer.momentum.w"])
def test_plain_values_that_are_not_finite_have_no_norm(tmp_path: Path, odd: float, name: str) -> None:
    tensor = torch.zeros(4, 4)
    tensor[3, 3] = odd
    path = written(tmp_path, [whole(tensor, "float32", name)], replace(HEADER, quantiser="none"))
    assert inspect(path, load(path)) == float("inf")


def test_pieces_that_are_not_as_the_header_says_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [whole(values((3, 3)), "int4g64")])
    with pytest.raises(ValueError, match=r"^tensor 'w' is int4g64, not int8g256$"):
        inspect(path, load(path))
    path = written(tmp_path / "b", [whole(values((3, 3)), "int8g256", "outer.base.w")])
    with pytest.raises(ValueError, match=r"^tensor 'outer.base.w' is int8g256, not float32$"):
        inspect(path, load(path))


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    path = written(tmp_path, [whole(values((3, 50)), "int8g256", name) for name in "vw"])
    manifest, file = load(path), path / "writer-00000.bin"
    data = bytearray(file.read_bytes())
    for position in (0, 5, 100, 1000, len(data) - 1):
        data[position] ^= 1
        file.write_bytes(data)
        with pytest.raises(Damaged):
            inspect(path, manifest)
        data[position] ^= 1
    file.write_bytes(data[:-1])
    with pytest.raises(Damaged):
        inspect(path, manifest)


def test_the_controller_inspects_without_torch() -> None:
    program = "import sys, checkpoints.update; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
