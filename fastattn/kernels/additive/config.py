"""Tile sizes, apart from the maths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A tile of a Triton kernel, the warps of its program, and the most registers of a thread.

    ``scores``: queries by keys. ``gradient``: queries, or keys, by features. With None the assembler chooses how many
    registers; it may then spill a few bytes so that one more program fits.
    """

    first: int
    second: int
    warps: int = 4
    registers: int | None = None


_override: Tile | None = None


@contextlib.contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Use one tile for every Triton kernel: for tests, which want several tiles in short sequences."""
    global _override
    previous, _override = _override, tile
    try:
        yield
    finally:
        _override = previous


# A thread holds some 16 numbers of a tile, or of two with coverage: nothing spills on sm_80, sm_90 and sm_100
# (benchmarks/budget_additive.py). A decoder's step has one query: a tile of one row wastes no tanh.
_SCORES, _SCORES_ONE_ROW = Tile(64, 64, 8, 128), Tile(1, 256, 4)
_GRADIENT = Tile(32, 64, 4)
# With fewer queries than this a copy of the keys, features first, costs more than the strided loads it saves.
FEATURES_FIRST_ROWS = 16


def scores_tile(rows: int) -> Tile:
    """Queries by keys, for so many queries."""
    if _override is not None:
        return _override
    return _SCORES_ONE_ROW if rows == 1 else _SCORES


def gradient_tile() -> Tile:
    """Queries, or keys, by features."""
    return _override or _GRADIENT


@dataclass(frozen=True)
class Blocks:
    """A tile of the plain PyTorch path, queries by keys by features: how many numbers, and how many keys at most.

    With a quarter as many numbers calling the operators takes a third of the time; four times as many leave the
    second-level cache and take 1.2 to 1.5 times as long. Fewer keys leave room for more queries in a tile: of the
    two gradients each is a sum over the other's side, and a long sum is one operator.
    """

    numbers: int = 1 << 17
    keys: int = 64


BLOCKS = Blocks()
