"""Attention to a cache of keys and values against its peers, for a decoding step and for a few speculative tokens.

    pytest benchmarks/test_kv_cache.py --benchmark-only [--record FILE] [--seconds-left N]

Every row asserts that all answers agree. The peers have the keys of the cache as one dense tensor; on a GPU torch's
kernel for packed sequences reads the same pages. FLOP count the keys the sequences have, twice for QK and PV.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from measure import OURS, Call, attention_flops, compare
from test_attention import in_evaluation, on
from torch import Tensor, nn

import fastattn
from fastattn.profiling.environment import default_device

DEVICE = default_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# (batch, room for keys, query heads, key heads, head dimension, queries).
SHAPES = [(1, 4096, 8, 2, 64, 1), (4, 2048, 8, 8, 64, 1), (4, 2048, 8, 2, 64, 4)]
if CUDA:
    SHAPES = [
        (1, 131072, 32, 8, 128, 1), (16, 8192, 32, 8, 128, 1), (64, 4096, 32, 8, 128, 1), (1, 32768, 32, 32, 128, 1),
        (16, 8192, 32, 8, 128, 4), (128, 1024, 32, 8, 64, 1),
    ]  # fmt: skip
PAGES = {"contiguous": 0, "pages of 16": 16, "pages of 256": 256}
KINDS = {"full": False, "ragged": True}


def lengths_of(batch: int, room: int, ragged: bool) -> list[int]:
    """All full; or spread evenly, half of the room in all."""
    return [max(1, room * (2 * n + 1) // (2 * batch)) if ragged and batch > 1 else room for n in range(batch)]


def paged(dense: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """A pool that holds (B, Hkv, S, D) in shuffled pages, and its table."""
    batch, heads, room, dim = dense.shape
    count = batch * room // page
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(dense.device)
    pool = dense.new_empty(count, heads, page, dim)
    pool[order] = dense.unflatten(2, (room // page, page)).transpose(1, 2).flatten(0, 1)
    return pool, order.view(batch, room // page).int()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", PAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_decode(benchmark: Any, keep: Any, kind: str, layout: str, shape: tuple[int, ...]) -> None:
    batch, room, heads, key_heads, dim, rows = shape
    page = PAGES[layout]
    sizes = lengths_of(batch, room, KINDS[kind])
    query = torch.randn(batch, heads, rows, dim, device=DEVICE, dtype=DTYPE)
    key, value = (torch.randn(batch, key_heads, room, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    lengths = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    position = torch.arange(room, device=DEVICE)
    own = lengths[:, None] - rows + torch.arange(rows, device=DEVICE)
    mask = (position[None, None] <= own[:, :, None])[:, None]
    caches: tuple[Tensor, ...] = (key, value)
    table = None
    if page:
        (key_pool, table), (value_pool, _) = paged(key, page), paged(value, page)
        caches = (key_pool, value_pool)
    ours = functools.partial(fastattn.attention_with_kv_cache, query, *caches, lengths, block_table=table)
    sdpa = nn.functional.scaled_dot_product_attention
    full = kind == "full" and rows == 1
    runs: dict[str, Any] = {
        OURS: on("triton", ours) if CUDA else ours,
        "SDPA": lambda: sdpa(query, key, value, attn_mask=None if full else mask, enable_gqa=heads != key_heads),
    }
    if page:

        def gathered() -> Tensor:
            dense = (pool[table].transpose(1, 2).flatten(2, 3) for pool in caches)
            return sdpa(query, *dense, attn_mask=None if full else mask, enable_gqa=heads != key_heads)

        runs["SDPA on gathered pages"] = gathered
    if CUDA:
        runs["fastattn auto"] = ours
        if page == 256:  # FlashAttention 2 takes no smaller pages
            runs["varlen_attn"] = _torch_paged(query, caches, table, lengths, room)
    calls: dict[str, Call] = {name: in_evaluation(run) for name, run in runs.items()}
    flops = sum(attention_flops(1, heads, rows, size, dim, causal=False, training=False) for size in sizes)
    row = compare(benchmark, calls, DEVICE, flops=flops)
    moved = 2 * sum(sizes) * key_heads * dim * key.element_size()
    for figure in row["figures"].values():
        figure["gigabytes_per_second"] = moved / figure["seconds"] / 1e9
    keep({"shape": shape, "dtype": str(DTYPE), "kind": kind, "layout": layout} | row, DEVICE)


def _torch_paged(query: Tensor, caches: tuple[Tensor, ...], table: Tensor | None, lengths: Tensor, room: int) -> Any:
    """torch's kernel, whose pools are (pages, page_size, Hkv, D)."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, rows, dim = query.shape
    packed = query.transpose(1, 2).reshape(batch * rows, heads, dim)
    pools = [cache.transpose(1, 2).contiguous() for cache in caches]
    cu_seq_q = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * rows
    cu_seq_k = torch.zeros_like(cu_seq_q)
    cu_seq_k[1:] = lengths.cumsum(0)

    def call() -> Tensor:
        out = varlen_attn(
            packed, *pools, cu_seq_q, cu_seq_k, rows, room, window_size=(-1, 0), enable_gqa=True, seqused_k=lengths,
            block_table=table,
        )  # fmt: skip
        return out.unflatten(0, (batch, rows)).transpose(1, 2)

    return call
