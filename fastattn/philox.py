"""Philox4x32-10 in plain PyTorch: the dropout mask as a function of position alone.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Every backend draws the same mask from the same seed. One Philox call gives four 32-bit words, and they
serve the 2 x 2 entries (row, column), (row, column + 8), (row + 8, column), (row + 8, column + 8), because a
GPU's matrix accumulator holds exactly those four in one thread, in the forward tile and in its transpose:

    counter = (column without bit 3, row without bit 3, batch * heads + head, 0)
    key     = (low 32 bits of seed, high 32 bits of seed)
    word    = 2 * bit 3 of row + bit 3 of column
    keep    = (word >> 8) >= ceil(dropout_p * 2**24)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def keep_threshold(dropout_p: float) -> int:
    """The smallest 24-bit number that is kept: P(keep) = 1 - dropout_p, to within 2**-24."""
    return math.ceil(dropout_p * 2**24)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of Philox4x32-10, each an int64 tensor holding an unsigned 32-bit number.

    ``counter`` holds four broadcastable int64 tensors, ``seed`` one int64 number. A 32 x 32 bit product wraps in
    int64 without harm: its 64 bits are right, and the shifts below mask the sign away.
    """
    c0, c1, c2, c3 = counter
    key_a, key_b = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = (
            ((product_b >> 32) & _MASK32) ^ c1 ^ key_a,
            product_b & _MASK32,
            ((product_a >> 32) & _MASK32) ^ c3 ^ key_b,
            product_a & _MASK32,
        )
        key_a, key_b = (key_a + _KEY_A) & _MASK32, (key_b + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, dropout_p: float, batch: int, heads: int, rows: int, columns: int) -> Tensor:
    """Boolean (batch, heads, rows, columns): True where attention dropout keeps the entry.

    ``seed`` is an int64 tensor of one element, on the device of the result.
    """
    device = seed.device
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    batch_head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((column & ~8, row & ~8, batch_head, zero), seed.reshape(()))
    lower = torch.where((column & 8) == 0, words[0], words[1])
    upper = torch.where((column & 8) == 0, words[2], words[3])
    word = torch.where((row & 8) == 0, lower, upper)
    return (word >> 8) >= keep_threshold(dropout_p)
