"""Tile sizes, apart from the maths: one choice per kernel, dtype, head dimension and feature that costs registers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, and stages of the load pipeline."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2


KERNELS = ("forward", "delta", "dquery", "dkey_dvalue", "dmask", "weights")
_override: Tile | None = None


@contextlib.contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Use one tile for every kernel: for tests, which want several tiles in short sequences."""
    global _override
    previous, _override = _override, tile
    try:
        yield
    finally:
        _override = previous


def block_d(head_dim: int) -> int:
    """The head dimension as the kernels hold it: a power of two, at least the 16 a matrix product needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(kernel: str, dtype: torch.dtype, head_dim: int, *, dropout: bool = False, masked: bool = False) -> Tile:
    """The tile of a kernel; the budget table checks that each choice spills nothing on sm_80, sm_90 and sm_100."""
    if _override is not None:
        return _override
    dim = block_d(head_dim)
    if kernel == "delta":
        return Tile(64, 16, 4, 1)
    return Tile(64, 64, 4, 2) if dim <= 64 and dtype != torch.float32 else Tile(32, 32, 4, 2)
