"""What megatron-core does to the process it runs in."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallelism import device
from parallelism.layout import Layout
from parallelism.megatron import cpu
from parallelism.megatron.groups import form_groups
from parallelism.megatron.noise import hush
from parallelism.megatron.randomness import random_state, set_random_state
from tests.parallelism.forked import Ranks


def test_importing_touches_nothing_and_says_nothing() -> None:
    """So that a parent can import everything, and fork ranks that pick their device."""
    code = """
import sys, threading, torch
before = (torch.cuda.current_device, torch.Tensor.type, torch.Tensor.cuda)
import parallelism.rank
assert (torch.cuda.current_device, torch.Tensor.type, torch.Tensor.cuda) == before
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_expected_warnings_are_held_back(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        hush()
        warnings.warn("full scope is deprecated. Use empty cuda_graph_scope to capture", stacklevel=1)
        warnings.warn("`torch.distributed.reduce_scatter_tensor` is deprecated.", FutureWarning, stacklevel=1)
        warnings.warn("your disk is on fire", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["your disk is on fire"]
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("GPTModel is on fire")
    assert caplog.messages == ["GPTModel is on fire"]


def patched() -> tuple[Any, ...]:
    cpu.patch()
    cpu.patch()  # names are not prefixed twice
    one = torch.ones(2)
    return (
        torch.cuda.current_device(),
        one.type(),
        one.bfloat16().type(),
        one.type(torch.float64).dtype,
        one.cuda() is one,
        cpu.schedules.torch.zeros(2, device="cuda").device,
        cpu.utils.torch.tensor([1.0], device="cuda").device,
        cpu.optimizer.torch.zeros(1, device="meta").device,
        cpu.clip_grads.torch.float32,
    )


@pytest.mark.ranks
def test_patches(ranks: Ranks) -> None:
    here = torch.device("cpu")
    (found,) = ranks.run(1, patched)
    assert found == (
        *(here, "torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.float64, True),
        *(here, here, torch.device("meta"), torch.float32),
    )
    assert torch.Tensor.type(torch.ones(1)) == "torch.FloatTensor"  # not here, where nobody patched


def draws() -> tuple[bool, bool]:
    here = device.pick()
    device.join(here, 2)
    cpu.patch()
    form_groups(Layout(tp=2), seed=5)
    state = random_state()
    first = draw()
    others = [torch.empty_like(first) for _ in range(2)]
    dist.all_gather(others, first)
    set_random_state(state)
    return torch.equal(draw(), first), torch.equal(others[0], others[1])


def draw() -> torch.Tensor:
    """From the common generator, and from the one that differs between tensor-parallel ranks."""
    common = torch.rand(3)
    with cpu.parallel_random.get_cuda_rng_tracker().fork():
        return torch.cat([common, torch.rand(3)])


@pytest.mark.ranks
def test_random_states_can_be_taken_up(ranks: Ranks) -> None:
    assert ranks.run(2, draws) == [(True, False)] * 2


def groups() -> dict[str, list[int]]:
    device.join(device.pick(), 8)
    cpu.patch()
    formed = form_groups(Layout(tp=2, dp=2, pp=2), seed=5)
    return {axis: dist.get_process_group_ranks(getattr(formed, axis)) for axis in ("tp", "dp", "pp")}


@pytest.mark.ranks
def test_megatron_and_the_layout_number_ranks_alike(ranks: Ranks) -> None:
    layout = Layout(tp=2, dp=2, pp=2)
    for rank, found in enumerate(ranks.run(8, groups)):
        at = layout.coordinates(rank)
        for axis, members in found.items():
            others = {"tp", "dp", "pp"} - {axis}
            same = [
                r
                for r in range(8)
                if all(getattr(layout.coordinates(r), other) == getattr(at, other) for other in others)
            ]
            assert members == same
