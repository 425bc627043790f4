"""What the kernels compute, in plain torch: the definition they are tested against, and the way on a CPU.

Quantisation by groups. A tensor's last dimension is cut into groups of `group` consecutive elements, from
its global beginning; a part of the tensor that begins `phase` elements into a group has a shorter first
group. A group with the largest magnitude m has the scale s = bf16(m / levels), levels = 2^(bits - 1) - 1,
and an element x of it the code rint(x / s), which stands for code s. So |x - code s| <= s / 2, and what a
code stands for has that code again. bf16 has the range of fp32: late in a training differences are too
small for fp16 scales. Shapes: L any leading dimensions, C columns (the last dimension), N groups.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def group_maxima(values_LC: torch.Tensor, group: int, phase: int) -> torch.Tensor:
    """Largest magnitude in each group: [L, N]. NaN where a group holds one."""
    return _grouped(values_LC, group, phase).abs().amax(dim=-1)


def quantise(
    values_LC: torch.Tensor, maxima_LN: torch.Tensor, group: int, phase: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [L, C] and scales bf16 [L, N] of finite fp32 values.

    `maxima_LN` are those of the whole groups, also where only a part of a group is among the values.
    """
    levels = 2 ** (bits - 1) - 1
    scales_LN = (maxima_LN / levels).bfloat16()
    grouped_LNG = _grouped(values_LC, group, phase) / scales_LN.float().unsqueeze(-1)
    grouped_LNG.nan_to_num_(0.0, 0.0, 0.0)  # where the scale is 0, so is the value or nearly
    codes_LNG = grouped_LNG.round_().clamp_(-levels, levels).to(torch.int8)
    return _ungrouped(codes_LNG, values_LC.shape[-1], phase), scales_LN


def dequantise(codes_LC: torch.Tensor, scales_LN: torch.Tensor, group: int, phase: int) -> torch.Tensor:
    """fp32 values [L, C]: one correctly rounded product each, so that any hardware has the same ones."""
    grouped_LNG = _grouped(codes_LC.float(), group, phase) * scales_LN.float().unsqueeze(-1)
    return _ungrouped(grouped_LNG, codes_LC.shape[-1], phase)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes from -8 to 7, two in a byte: uint8 [ceil(n / 2)], the first in the low half, each plus 8."""
    flat = (codes.reshape(-1) + 8).to(torch.uint8)
    pairs = pad(flat, (0, flat.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` codes: int8 [count]."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.view(-1)[:count].to(torch.int8) - 8


def _grouped(values_LC: torch.Tensor, group: int, phase: int) -> torch.Tensor:
    """[L, N, G], zeros where a group reaches beyond the values."""
    behind = -(phase + values_LC.shape[-1]) % group
    padded = pad(values_LC, (phase, behind))
    return padded.view(*padded.shape[:-1], -1, group)


def _ungrouped(grouped_LNG: torch.Tensor, columns: int, phase: int) -> torch.Tensor:
    return grouped_LNG.flatten(-2)[..., phase : phase + columns].contiguous()
