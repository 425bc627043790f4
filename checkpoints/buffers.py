"""Memory that a rank owns and its writer process reads: where the state of a step waits for the disk.

The memory belongs to an anonymous file whose descriptor the writer inherits. It has no name, so nothing is
left behind when both have ended, however they ended.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Sequence

import torch

from checkpoints.image import Place, pack
from checkpoints.reader import Shard, dtype_name

Pin = Callable[[torch.Tensor], None]


class Buffer:
    """One image of a rank's state, and behind it the order that tells the writer what to do with it."""

    def __init__(self, room: int, pin: Pin | None = None) -> None:
        """`pin` prepares the memory (uint8 [room]) for copies from a device. Raises OSError.

        The pages are the writer's to fault in, beside the training: 512 MiB took 0.2 to 2.5 s.
        """
        self.file = os.memfd_create("eurotrain-checkpoint")
        os.ftruncate(self.file, room)
        self.bytes = torch.frombuffer(mmap.mmap(self.file, room), dtype=torch.uint8)
        self._places: Sequence[Place] = ()
        if pin is not None:
            pin(self.bytes)

    @property
    def room(self) -> int:
        return len(self.bytes)

    def fill(self, places: Sequence[Place], tensors: Iterable[torch.Tensor]) -> None:
        """Copy the tensors to their places; those on a device may arrive after the return."""
        if places != self._places:
            self.bytes.zero_()  # what lies between the places belongs to the file
            self._places = places
        for place, tensor in zip(places, tensors, strict=True):
            target = self.bytes[place.position : place.end].view(tensor.dtype).view(place.shape)
            target.copy_(tensor.detach(), non_blocking=True)

    def note(self, position: int, text: bytes) -> None:
        self.bytes[position : position + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def close(self) -> None:
        """The memory itself goes with the last reference to `bytes`."""
        os.close(self.file)


def places_of(shards: Iterable[Shard]) -> list[Place]:
    """Where the shards will lie, one after the other."""
    return pack(
        (s.name, tuple(s.global_shape), tuple(s.offset), tuple(s.tensor.shape), dtype_name(s.tensor.dtype))
        for s in shards
    )
