"""Presets: the published parameter counts come out, so the shapes are the published ones."""

from __future__ import annotations

import pytest

from clusters.segment import ModelShape
from orchestrator.models import preset, preset_names

PUBLISHED = {
    "eurollm-9b": 9_152_319_488,  # the model card says 9.154 billion; by its sizes it is this
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3m": 3_147_456,
    "llama-7m": 7_096_576,
    "moe-6m": 6_692_544,
    "salamandra-2b": 2_253_490_176,
    "salamandra-7b": 7_768_117_248,
}


@pytest.mark.parametrize("name", preset_names())
def test_parameters_are_as_published(name: str) -> None:
    assert ModelShape(**preset(name)).parameters == PUBLISHED[name]


def test_of_experts_two_work_on_a_token() -> None:
    model = ModelShape(**preset("moe-6m"))
    expert = 3 * 192 * 256
    assert model.parameters - model.active_parameters == 4 * (8 - 2) * expert
    dense = ModelShape(**preset("llama-7m"))
    assert dense.active_parameters == dense.parameters


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown preset 'lama-7m': did you mean 'llama-7m'"):
        preset("lama-7m")


def test_a_preset_cannot_lead_out_of_its_folder() -> None:
    with pytest.raises(ValueError, match="unknown preset"):
        preset("../../pyproject")
