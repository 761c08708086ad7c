"""Tile sizes of the decode kernels and into how many parts the keys are split, apart from the maths."""

from __future__ import annotations

import torch

from fastattn.kernels.attention.config import Tile, block_d

# Programs wanted on every multiprocessor: reading the cache is all the work, and one alone has too few loads in flight.
_PROGRAMS_PER_PROCESSOR = 2
# A part shorter than this costs more to combine than it saves.
_LEAST_KEYS = 256
MAX_SPLITS = 128
# Splits of a partial result that one step of the combining kernel adds.
COMBINE_STEP = 16
# Tokens one program appends.
APPEND_TOKENS = 16
_ROWS = (16, 32, 64)


def tile(dtype: torch.dtype, head_dim: int, packed_rows: int) -> Tile:
    """The tile for ``packed_rows`` = group x L queries; a matrix product needs 16 of them."""
    held = block_d(head_dim)
    if dtype == torch.float32:  # without tensor cores the operands of a product live in registers
        if held > 128:
            return Tile(16, 16, 8, 1, 255)
        return Tile(16, 32 if held == head_dim else 16, 8, 2, 255)
    largest = 64 if held <= 128 else 32
    block_m = next((rows for rows in _ROWS if rows >= min(packed_rows, largest)), largest)
    block_n = 64 if held <= 128 else 32
    return Tile(block_m, block_n, 8, 2, 255) if block_m == 64 else Tile(block_m, block_n)


def splits(programs: int, capacity: int, processors: int) -> int:
    """Parts of the keys, from shapes alone: enough to fill the device, none too short if the cache is full."""
    wanted = _PROGRAMS_PER_PROCESSOR * processors // max(programs, 1)
    return max(1, min(wanted, capacity // _LEAST_KEYS, MAX_SPLITS))
