"""How the elements of a piece are stored: plainly, or quantised by groups (kernels/reference.py). No torch.

A plain dtype stores its elements row-major and little-endian. A quantised one, named after its bits and
group, stores what stands for fp32 elements: first the scale of each group (bf16, in the order of the
groups), then the codes row-major, as int8 or, for 4 bits, two to a byte. Groups are counted along the last
dimension from the beginning of the global tensor, wherever a piece begins, so that they are the same in
all layouts; a group that is cut has its scale in both pieces. A scalar is a tensor of one element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from checkpoints.ranges import Shape

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "uint8": 1, "bool": 1,
}  # fmt: skip
SCALE_BYTES = 2


@dataclass(frozen=True)
class Quantised:
    """Codes of so many bits, and a scale for each so many elements."""

    bits: int
    group: int

    def phase(self, offset: Shape) -> int:
        """How many elements of its first group a piece lacks."""
        return offset[-1] % self.group if offset else 0

    def groups(self, offset: Shape, shape: Shape) -> Shape:
        """Shape of the scales of the piece that lies there."""
        first, last = (offset[-1], offset[-1] + shape[-1]) if shape else (0, 1)
        return (*shape[:-1], -(-last // self.group) - first // self.group)

    def scale_bytes(self, offset: Shape, shape: Shape) -> int:
        return SCALE_BYTES * math.prod(self.groups(offset, shape))

    def bytes(self, offset: Shape, shape: Shape) -> int:
        return self.scale_bytes(offset, shape) + -(-math.prod(shape) * self.bits // 8)


# Measured on outer differences: int8 3.97 times smaller than fp32 with an error of 0.6 %, int4 7.5 times
# with 9.8 %. Smaller groups follow the values better and cost more scales.
QUANTISED = {"int8g256": Quantised(8, 256), "int4g64": Quantised(4, 64)}
# What a run may choose, and how the elements of an outer difference are then stored.
QUANTISERS = {"none": "float32", "int8": "int8g256", "int4": "int4g64"}
DTYPES = (*ITEM_BYTES, *QUANTISED)


def stored_bytes(dtype: str, offset: Shape, shape: Shape) -> int:
    """Of a piece that begins at `offset` of its global tensor."""
    if dtype in QUANTISED:
        return QUANTISED[dtype].bytes(offset, shape)
    return math.prod(shape) * ITEM_BYTES[dtype]
