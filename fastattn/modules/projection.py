"""The input projections of multi-head attention, as strided views (B, H, L, D) of as few matrix products as possible.

| inputs that are one tensor | products                   |
|----------------------------|----------------------------|
| query, key, value          | 1: the whole packed weight |
| key, value                 | 2: query; key and value    |
| query, key                 | 2: query and key; value    |
| none                       | 3                          |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.modules.linear import linear


def packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, heads: int, batch_first: bool
) -> list[Tensor]:
    """Queries, keys and values (B, H, L, D) for one weight (3 * E, E) that stacks the three projections.

    The inputs are (B, L, E), or (L, B, E) without ``batch_first``.
    """
    if key is value and query is key:
        return _heads(linear(query, weight, bias), 3, heads, batch_first)
    if key is value:
        sources, counts = (query, key), (1, 2)
    elif query is key:
        sources, counts = (query, value), (2, 1)
    else:
        return separate((query, key, value), weight.chunk(3), bias, heads, batch_first)
    rows = [count * weight.shape[1] for count in counts]
    shifts = (None, None) if bias is None else torch.split(bias, rows)
    views = []
    for source, part, shift, count in zip(sources, torch.split(weight, rows), shifts, counts, strict=True):
        views += _heads(linear(source, part, shift), count, heads, batch_first)
    return views


def separate(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, heads: int, batch_first: bool
) -> list[Tensor]:
    """Queries, keys and values (B, H, L, D), each with its own weight: (E, E), (E, kdim) and (E, vdim)."""
    shifts = (None, None, None) if bias is None else bias.chunk(3)
    views = []
    for source, weight, shift in zip(inputs, weights, shifts, strict=True):
        views += _heads(linear(source, weight, shift), 1, heads, batch_first)
    return views


def append_keys(
    key: Tensor, value: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, zero: bool
) -> tuple[Tensor, Tensor, int]:
    """Keys and values (B, H, S, D) followed by the learned ones (1, 1, E), then by a zero; and how many these are."""
    extended = []
    for tensor, bias in ((key, bias_k), (value, bias_v)):
        rows = tensor.transpose(1, 2)
        batch, _, heads, dim = rows.shape
        parts = [rows]
        if bias is not None:
            parts.append(bias.to(rows.dtype).view(1, 1, heads, dim).expand(batch, 1, heads, dim))
        if zero:
            parts.append(rows.new_zeros(batch, 1, heads, dim))
        extended.append(torch.cat(parts, dim=1).transpose(1, 2))
    return extended[0], extended[1], (bias_k is not None) + zero


def _heads(product: Tensor, count: int, heads: int, batch_first: bool) -> list[Tensor]:
    """Split (B, L, count * E), or (L, B, count * E), into ``count`` views (B, H, L, D).

    One unbind, not three slices: its gradient is written by one stack instead of three padded tensors.
    """
    first, second, width = product.shape
    split = product.view(first, second, count, heads, width // (count * heads)).unbind(2)
    return [part.transpose(1, 2) if batch_first else part.permute(1, 2, 0, 3) for part in split]
