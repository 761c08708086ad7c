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


# Kernel -> tile, by the block of the head dimension it is for (the first that is large enough) in ascending order.
# "plain" calls draw no dropout and load no mask; "heavy" ones do, and pay for it in registers. The choices are the
# largest of those tried that spill nothing on sm_80, sm_90 and sm_100, or else least: the budget table
# (benchmarks/budget.py) names what still spills, float32 above 128 most of all. wgmma needs 64 rows of its product,
# queries in most kernels and keys in dkey_dvalue; dkey_dvalue and dmask above 128 would spill with as many.
_HALF_PLAIN = {
    "forward": {64: Tile(128, 64, 8), 128: Tile(64, 64, 8), 256: Tile(64, 32, 8)},
    "dquery": {64: Tile(64, 64, 8), 128: Tile(64, 64, 8), 256: Tile(64, 32, 8)},
    "dkey_dvalue": {128: Tile(32, 64, 8), 256: Tile(16, 32, 8, 1)},
    "dmask": {128: Tile(64, 32, 8), 256: Tile(16, 64, 8, 1)},
    "weights": {128: Tile(64, 64, 8), 256: Tile(64, 32, 8)},
}
_HALF_HEAVY = {
    "forward": {128: Tile(64, 32, 8), 256: Tile(64, 32, 8, 1)},
    "dquery": {128: Tile(64, 32, 8), 256: Tile(64, 16, 8)},
    "dkey_dvalue": {128: Tile(16, 64, 8), 256: Tile(16, 32, 8, 1)},
    "dmask": {128: Tile(64, 16, 8, 1), 256: Tile(16, 64, 8, 1)},
    "weights": {128: Tile(64, 32, 8), 256: Tile(64, 16, 8)},
}
# Without tensor cores (IEEE float32) the operands of a product live in registers: small tiles.
_FLOAT32 = {64: Tile(32, 32, 8), 128: Tile(16, 32, 8), 256: Tile(16, 16, 8, 1)}
_DELTA = Tile(64, 16, 4, 1)


def tile(kernel: str, dtype: torch.dtype, head_dim: int, *, heavy: bool = False) -> Tile:
    """The tile of a kernel; ``heavy`` where it loads a mask, draws dropout or follows a window."""
    if _override is not None:
        return _override
    if kernel == "delta":
        return _DELTA
    choices = _FLOAT32 if dtype == torch.float32 else (_HALF_HEAVY if heavy else _HALF_PLAIN)[kernel]
    return next(choice for largest, choice in choices.items() if block_d(head_dim) <= largest)
