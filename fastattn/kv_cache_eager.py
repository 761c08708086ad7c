"""The eager definition of a key and value cache: appending to it, and attention to it through the dense function.

A sequence of n tokens is the first n rows of its cache, or of its pages in the table's order. Query i of L stands at
position n - L + i, so bottom-right alignment of a dense call with exactly those n keys says the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import functional


@dataclass(frozen=True)
class Scoring:
    """What decides the scores and the results; as ``scaled_dot_product_attention`` takes it."""

    scale: float
    softcap: float | None
    window: tuple[int | None, int | None]
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    return_lse: bool


def capacity(key_cache: Tensor, block_table: Tensor | None) -> int:
    """Tokens a sequence has room for."""
    return key_cache.shape[2] if block_table is None else key_cache.shape[2] * block_table.shape[1]


def append(
    key_cache: Tensor, value_cache: Tensor, new_key: Tensor, new_value: Tensor, cache_lengths: Tensor,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Write new_key (B, Hkv, T, D) and new_value behind what each sequence holds, in place, reading nothing back.

    Tokens without room and those whose page lies outside the pool are dropped: they repeat another token's write.
    """
    batch, heads, tokens, _ = new_key.shape
    if 0 in (batch, heads, tokens, key_cache.shape[0], capacity(key_cache, block_table)):
        return
    position = cache_lengths[:, None].long() + torch.arange(tokens, device=new_key.device)
    page, row, held = _places(position, key_cache, block_table)
    page, row, held = page.flatten(), row.flatten(), held.flatten()
    # Where no token can be written, all write back what stands at one place.
    model = held.int().argmax(0, keepdim=True)  # one dimension: indexing with a number would wait for the device
    page, row = torch.where(held, page, page[model]), torch.where(held, row, row[model])
    for cache, new in ((key_cache, new_key), (value_cache, new_value)):
        flat = new.transpose(1, 2).flatten(0, 1)  # (B T, Hkv, D)
        instead = torch.where(held[model, None, None], flat[model], cache[page[model], :, row[model]])
        cache[page, :, row] = torch.where(held[:, None, None], flat, instead)


def attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, block_table: Tensor | None, how: Scoring
) -> Any:
    """Output, and LSE where asked for, for sequences of ``lengths`` (B,) tokens, the query's own included."""
    if lengths.device.type == "cpu":
        return by_sequence(query, key_cache, value_cache, lengths, block_table, how)
    return at_once(query, key_cache, value_cache, lengths, block_table, how)


def at_once(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, block_table: Tensor | None, how: Scoring
) -> Any:
    """One dense call on a copy of the cache in which all sequences end at the last column; reads no length back."""
    columns = capacity(key_cache, block_table)
    length = lengths.long().clamp(0, columns)
    position = torch.arange(columns, device=query.device) - (columns - length)[:, None]
    if key_cache.shape[0] == 0:
        key = key_cache.new_zeros(query.shape[0], key_cache.shape[1], columns, key_cache.shape[3])
        value = value_cache.new_zeros(*key.shape[:3], value_cache.shape[3])
        return _dense(query, key, value, how, padding=position >= columns)
    page, row, _ = _places(position, key_cache, block_table)
    padding = position >= 0
    # What lies behind a sequence may be anything, and 0 times NaN is NaN.
    key, value = (
        cache[page, :, row].masked_fill_(~padding[:, :, None, None], 0.0).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
    return _dense(query, key, value, how, padding)


def by_sequence(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, block_table: Tensor | None, how: Scoring
) -> Any:
    """A dense call for each sequence with exactly the keys it has; one call where all are equally long."""
    columns = capacity(key_cache, block_table)
    sizes = lengths.clamp(0, columns).tolist()
    if block_table is None and len(set(sizes)) <= 1:
        size = sizes[0] if sizes else 0
        return _dense(query, key_cache[:, :, :size], value_cache[:, :, :size], how)
    results = []
    for number, size in enumerate(sizes):
        one = slice(number, number + 1)
        if block_table is None:
            key, value = key_cache[one, :, :size], value_cache[one, :, :size]
        else:
            used = block_table[number, : -(-size // key_cache.shape[2])]
            pages = used.long().clamp(0, max(key_cache.shape[0] - 1, 0))
            key, value = (
                cache[pages].transpose(0, 1).flatten(1, 2)[None, :, :size] for cache in (key_cache, value_cache)
            )
        results.append(_dense(query[one], key, value, how, sequence=number))
    if not results:
        return _dense(query, key_cache[:0], value_cache[:0], how)
    if how.return_lse:
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    return torch.cat(results)


def _places(position: Tensor, key_cache: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Page (or batch) and row of the tokens at ``position`` (B, T), and which of them exist; the others are clamped."""
    room = capacity(key_cache, block_table)
    held = (position >= 0) & (position < room)
    position = position.clamp(0, max(room - 1, 0))
    if block_table is None:
        batch = torch.arange(position.shape[0], device=position.device)
        return batch[:, None].expand_as(position), position, held
    page = block_table.long().gather(1, position // key_cache.shape[2])
    held = held & (page >= 0) & (page < key_cache.shape[0])
    return page.clamp(0, max(key_cache.shape[0] - 1, 0)), position % key_cache.shape[2], held


def _dense(
    query: Tensor, key: Tensor, value: Tensor, how: Scoring, padding: Tensor | None = None, sequence: int | None = None
) -> Any:
    slopes = how.alibi_slopes  # (1 or B, H)
    if slopes is not None and slopes.shape[0] == 1:
        slopes = slopes[0]
    elif slopes is not None and sequence is not None:
        slopes = slopes[sequence]
    return functional.scaled_dot_product_attention(
        query, key, value, scale=how.scale, enable_gqa=True, key_padding_mask=padding, window=how.window,
        softcap=how.softcap, alibi_slopes=slopes, sinks=how.sinks, causal_alignment="bottom-right",
        return_lse=how.return_lse,
    )  # fmt: skip
