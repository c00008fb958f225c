"""Randomness that belongs to a sample: a counter-based hash, the same on every device and rank.

Each sample of an epoch has an int64 key; whatever is drawn for it is a pure function of
(key, salt, position). So crops and masks do not depend on the number of ranks, on
micro-batches or on where a run was resumed. The mixer is the finaliser of SplitMix64
(Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch
from torch import Tensor

GOLDEN, MIX1, MIX2, BITS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64 - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= BITS
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _MIX1, _MIX2 = map(_signed, (GOLDEN, MIX1, MIX2))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic, so the copies of the sign are masked away."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64; products wrap around."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def mix_int(x: int) -> int:
    """The same of one number, as 64 bits without a sign: a tensor of one takes eighty times as long."""
    x = (x + GOLDEN) & BITS
    x = ((x ^ x >> 30) * MIX1) & BITS
    x = ((x ^ x >> 27) * MIX2) & BITS
    return x ^ x >> 31


def sample_keys(seed: int, epoch: int, index: Tensor) -> Tensor:
    """One key a sample and epoch. `index` int64 [B] -> int64 [B]."""
    return mix(mix(index) ^ _base(seed, epoch))


@lru_cache(maxsize=16)
def _base(seed: int, epoch: int) -> int:
    return _signed(mix_int(mix_int(seed) + epoch))


def uniform(keys: Tensor, n: int, salt: str) -> Tensor:
    """Draws in [0, 1), float64 [B, n] for keys int64 [B]; another `salt` gives independent draws."""
    position = torch.arange(n, device=keys.device, dtype=torch.int64)
    salted = mix(keys ^ zlib.crc32(salt.encode()))
    return _shift(mix(salted[:, None] + position * _GOLDEN), 11).double() * 2.0**-53
