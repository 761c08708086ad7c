"""Checks of what tensors hold, not only of their shapes: sequence boundaries, lengths of a cache, tables of pages.

Such a check reads the tensor. On the CPU it is always made, because it costs nothing; on a GPU it waits for the device,
so it is made inside ``debug_checks()`` only. Without it a bad index is clamped or masked, never followed out of bounds.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

_enabled = False


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
    """Check, inside the block and in all threads, what tensors on a GPU hold; each check waits for the device.

    With it ``attention_with_kv_cache`` raises ValueError for lengths beyond the cache and for tables that point outside
    the pool of pages, compiled or not. It cannot be used while a CUDA graph is captured.
    """
    global _enabled
    previous, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = previous


def may_read(tensor: Tensor) -> bool:
    """Whether the contents of this tensor are to be checked."""
    return tensor.device.type == "cpu" or _enabled


def check_cu_seq(name: str, bounds: list[int], total: int | None, longest: int, longest_name: str) -> None:
    """Boundaries [0, ..., total] of sequences packed one after another, none longer than ``longest``.

    ``total`` None: the last boundary may be anything.
    """
    if bounds[0] != 0:
        raise ValueError(f"{name}: got first boundary {bounds[0]}, expected 0")
    lengths = [after - before for before, after in itertools.pairwise(bounds)]
    for number, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{name}: got {bounds[number]} before {bounds[number + 1]} at position {number}, expected ascending"
            )
    if total is not None and bounds[-1] != total:
        raise ValueError(f"{name}: got last boundary {bounds[-1]}, expected the number of packed tokens, {total}")
    if lengths and max(lengths) > longest:
        raise ValueError(f"{longest_name}: got {longest}, expected at least the longest sequence, {max(lengths)}")


def check_used(used: list[int], bounds: list[int]) -> None:
    """How many keys of each sequence take part, where ``bounds`` [0, ..., total] say how many it has."""
    for number, (n, (before, after)) in enumerate(zip(used, itertools.pairwise(bounds), strict=True)):
        if not 0 <= n <= after - before:
            raise ValueError(f"seqused_k: got {n} for sequence {number}, allowed are 0 to its {after - before} keys")


def check_cache(cache_lengths: Tensor, appended: int, capacity: int, block_table: Tensor | None, pages: int) -> None:
    """Lengths (B,) before ``appended`` more tokens within ``capacity``, and used pages of the table within the pool."""
    if cache_lengths.numel() == 0:
        return
    low, high = (int(bound) for bound in cache_lengths.aminmax())
    if low < 0 or high + appended > capacity:
        raise ValueError(
            f"cache_lengths: got lengths from {low} to {high} and {appended} new tokens, allowed are 0 to {capacity}, "
            "the tokens a sequence of the cache has room for"
        )
    if block_table is None or block_table.numel() == 0:
        return
    page_size = capacity // block_table.shape[1]
    first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    used = first < (cache_lengths + appended)[:, None]
    bad = used & ((block_table < 0) | (block_table >= pages))
    if bad.any():
        sequence, place = (int(number) for number in bad.nonzero()[0])
        raise ValueError(
            f"block_table: got page {int(block_table[sequence, place])} at [{sequence}, {place}], "
            f"allowed are 0 to {pages - 1}, the pages of the pool"
        )
