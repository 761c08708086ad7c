"""Nested inputs of MultiheadAttention: padded, attended with a padding mask, and nested again."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Nested query, key and value as (B, L, E), (B, S, kdim), (B, S, vdim) and a mask (B, S), True on padding."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor


def pad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    batch_first: bool,
) -> Padded:
    """The padded form; inputs that are one tensor stay one.

    Raises AssertionError, torch's for nested inputs it does not take: a mask beside them, batch_first=False, some
    inputs nested and others not.
    """
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None:
            raise AssertionError(f"{name}: got a mask beside nested inputs, expected None: they carry their lengths")
    if not batch_first:
        raise AssertionError("batch_first: got False with nested inputs, expected True")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_nested:
            raise AssertionError(f"{name}: got a dense tensor, expected a nested one as the other inputs are")
    dense_query = torch.nested.to_padded_tensor(query, 0.0)
    dense_key = dense_query if key is query else torch.nested.to_padded_tensor(key, 0.0)
    if value is query:
        dense_value = dense_query
    else:
        dense_value = dense_key if value is key else torch.nested.to_padded_tensor(value, 0.0)
    lengths = torch.tensor(_lengths(key), device=key.device)
    positions = torch.arange(dense_key.shape[1], device=key.device)
    return Padded(dense_query, dense_key, dense_value, positions >= lengths[:, None])


def nest(out: Tensor, like: Tensor) -> Tensor:
    """Rows of (B, L, E) that are no padding, nested as ``like`` is."""
    rows = [part[:length] for part, length in zip(out.unbind(), _lengths(like), strict=True)]
    if like.layout == torch.jagged:
        # The same offsets object: nested tensors of one ragged dimension can be added to each other.
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets=cast(Any, like).offsets())
    return torch.nested.as_nested_tensor(rows)


def drop_padding(weights: Tensor, query: Tensor) -> Tensor:
    """Weights (B, L, S) or (B, H, L, S) with zeros in the rows of padded queries."""
    lengths = torch.tensor(_lengths(query), device=weights.device)
    padding = torch.arange(weights.shape[-2], device=weights.device) >= lengths[:, None]
    shape = (padding.shape[0], *(1,) * (weights.dim() - 3), padding.shape[1], 1)
    return weights.masked_fill(padding.view(shape), 0.0)


def _lengths(nested: Tensor) -> list[int]:
    return [part.shape[0] for part in nested.unbind()]
