"""Checks of nn.MultiheadAttention's arguments: torch's exception types, messages that name the argument.

Shapes are compared for equality only, never ordered, so that a compiled module keeps one graph for every length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.validation import autocast_enabled


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises AttributeError, torch's for an input that is no tensor."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise AttributeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")


def check_ranks(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Numbers of dimensions and mask dtypes; True where the call is batched.

    Raises TypeError for a mask that is no tensor, AssertionError for a wrong rank or mask dtype, RuntimeError for a
    mask on another device.
    """
    rank = query.dim()
    if rank != 2 and rank != 3:
        raise AssertionError(f"query: got {rank} dimensions, expected 3, or 2 without a batch")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != rank:
            raise AssertionError(f"{name}: got {tensor.dim()} dimensions, expected query's {rank}")
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, (rank - 1,), query.device)
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, (2, 3), query.device)
    return rank == 3


def _check_mask(name: str, mask: Tensor, ranks: Sequence[int], device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected a torch.Tensor or None")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"{name}: got dtype {mask.dtype}, allowed are bool and floating-point types")
    if mask.dim() not in ranks:
        raise AssertionError(f"{name}: got {mask.dim()} dimensions, expected {' or '.join(map(str, ranks))}")
    if mask.device != device:
        raise RuntimeError(f"{name}: got device {mask.device}, expected query's {device}")


def check_features(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, kdim: int, vdim: int) -> None:
    """Feature sizes.

    Raises AssertionError for query, for value beside another key, and where key and value have projections of their
    own (``kdim`` or ``vdim`` differ from ``embed_dim``); RuntimeError where torch's matrix product would.
    """
    if query.shape[-1] != embed_dim:
        raise AssertionError(f"query: got {query.shape[-1]} features, expected embed_dim = {embed_dim}")
    if key is query and value is query:
        return
    packed = kdim == embed_dim and vdim == embed_dim
    if packed and key.shape[-1] != value.shape[-1]:
        raise AssertionError(f"value: got {value.shape[-1]} features, expected key's {key.shape[-1]}")
    error = RuntimeError if packed else AssertionError
    for name, tensor, size, wanted in (("key", key, "kdim", kdim), ("value", value, "vdim", vdim)):
        if tensor.shape[-1] != wanted:
            raise error(f"{name}: got {tensor.shape[-1]} features, expected {size} = {wanted}")


def check_dtypes(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> None:
    """Dtypes and devices equal the parameters'; under autocast the matrix product brings dtypes together.

    Raises RuntimeError.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device != weight.device:
            raise RuntimeError(f"{name}: got device {tensor.device}, expected the parameters' {weight.device}")
        if tensor.dtype != weight.dtype and not autocast_enabled(tensor.device.type):
            raise RuntimeError(f"{name}: got dtype {tensor.dtype}, expected the parameters' {weight.dtype}")


def check_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    heads: int,
    batch_first: bool,
    batched: bool,
) -> None:
    """Batch sizes, lengths and mask shapes: inputs (B, L, ...) or (L, B, ...), masks (B, S) and (B * heads, L, S).

    Raises AssertionError for value, key_padding_mask and an attn_mask with heads in a call that is not ``batched``,
    RuntimeError for key and any other attn_mask.
    """
    first, second = (0, 1) if batch_first else (1, 0)
    batch, rows, columns = query.shape[first], query.shape[second], key.shape[second]
    if value is not key and (value.shape[first] != key.shape[first] or value.shape[second] != columns):
        raise AssertionError(
            f"value: got shape {tuple(value.shape)}, expected key's batch size {key.shape[first]} and length {columns}"
        )
    if key is not query and key.shape[first] != batch:
        raise RuntimeError(f"key: got batch size {key.shape[first]}, expected query's {batch}")
    if key_padding_mask is not None and (key_padding_mask.shape[0] != batch or key_padding_mask.shape[1] != columns):
        raise AssertionError(
            f"key_padding_mask: got shape {tuple(key_padding_mask.shape)}, expected (batch, key length) = "
            f"{(batch, columns)}"
        )
    if attn_mask is None:
        return
    *lead, mask_rows, mask_columns = attn_mask.shape
    if mask_rows != rows or mask_columns != columns or (lead and lead[0] != batch * heads):
        error = AssertionError if lead and not batched else RuntimeError
        raise error(
            f"attn_mask: got shape {tuple(attn_mask.shape)}, expected (query length, key length) = {(rows, columns)} "
            f"or (batch * num_heads, query length, key length) = {(batch * heads, rows, columns)}"
        )
