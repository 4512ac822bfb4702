"""Counter-based random numbers as tensor operations: the same key gives the same numbers on any device.

A slot of an environment is fixed by (key, episode), so a run can be stopped, resumed, split over slots or
devices, and a vector environment agrees with single ones, without any hidden generator state and without
asking the host. The mixer is SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), on int64 that wraps around.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def fold(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from an old one and a number (an episode, a purpose). Shapes broadcast; int64."""
    if isinstance(data, int):  # as a Python number, which needs no transfer to the device
        spread = (data * _GOLDEN + 2**63) % 2**64 - 2**63
    else:
        spread = data.to(torch.int64) * _GOLDEN
    return _mix(_mix(key + _GOLDEN) ^ spread)


def uniform(key: Tensor, count: int) -> Tensor:
    """`count` float64 numbers in [0, 1) for every key: (B,) int64 -> (B, count)."""
    counters = torch.arange(1, count + 1, device=key.device, dtype=torch.int64)
    bits = _mix(key[..., None] + counters * _GOLDEN)
    return _shift_right(bits, 11).double() * 2.0**-53


def permutation(key: Tensor, count: int) -> Tensor:
    """A random permutation of 0..count-1 for every key: (B,) int64 -> (B, count) int64."""
    return uniform(key, count).argsort(dim=-1)


def integers(key: Tensor, high: Tensor | int) -> Tensor:
    """One integer in [0, high) for every key: (B,) int64."""
    return (uniform(key, 1)[..., 0] * high).long()
