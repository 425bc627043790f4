"""What megatron-core 0.16 and 0.19 take for granted about CUDA, answered on a machine without it.

Each patch is one named function with its reason; `patch` applies them all. Nothing is patched at import.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher

_CPU = torch.device("cpu")


def patch() -> None:
    """Let megatron-core run on the CPU of this process; a second call changes nothing more."""
    _current_device()
    _current_stream()
    _random_states()
    _literal_devices()
    _type_names()


def _current_device() -> None:
    """Weights, receive buffers and gathered activations are put on `torch.cuda.current_device()`; the last
    stage's copy of a tied embedding is moved there by `cuda()`."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = _as_it_is  # type: ignore[assignment,method-assign]


def _current_stream() -> None:
    """0.19 looks it up before gradients are reduced, to make it wait for CUDA graphs: there are none. The
    dispatcher of tokens to experts copies their counts to the host on a stream of its own."""
    only = _Stream()
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: only  # type: ignore[assignment,return-value]  # noqa: ARG005
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment]
    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = _on_the_host


class _Stream:
    """Everything on a CPU has been done when the call returns; also the event of having recorded it."""

    def wait_stream(self, _: object) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _on_the_host(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _as_it_is(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _random_states() -> None:
    """Regions with randomness of their own (sequence-parallel dropout) swap CUDA's generator state."""
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()  # noqa: ARG005
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)  # noqa: ARG005
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    parallel_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # The fork checks that the CPU's generator was left alone and logs once per layer that it was not.
    parallel_random.logging.getLogger(parallel_random.__name__).addFilter(_is_not_about_cpu_state)


def _is_not_about_cpu_state(record: Any) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _literal_devices() -> None:
    """Token counts, norms, scales and balance losses are made with `device="cuda"` in these modules, the
    chunks of a context-parallel rank in pinned memory in the last."""
    for module in (schedules, optimizer, clip_grads, utils, moe_utils, rope_utils):
        module.torch = _TorchOnCpu("torch")


class _TorchOnCpu(types.ModuleType):
    """torch, as seen from one module: its factories put on the CPU what was meant for "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **_on_cpu(kwargs))

    def tensor(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **_on_cpu(kwargs))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    return {**kwargs, "device": _CPU} if kwargs.get("device") == "cuda" else kwargs


def _type_names() -> None:
    """Gradients and parameters are told apart by names such as "torch.cuda.FloatTensor"."""
    if not hasattr(torch.Tensor.type, "__wrapped__"):
        torch.Tensor.type = _named_as_on_cuda(torch.Tensor.type)  # type: ignore[method-assign]


def _named_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def named(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(tensor, dtype, *args, **kwargs)
        return original(tensor).replace("torch.", "torch.cuda.", 1)

    return named
