"""What each operator allocates: one definition for the kernels and for the shape rules of the compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """The output (B, H, L, Dv), laid out as (B, L, H, Dv) so that merging the heads afterwards is a view."""
    batch, heads, rows, _ = query.shape
    return _heads_last(query, batch, heads, rows, value.shape[-1])


def empty_logsumexp(query: Tensor) -> Tensor:
    """The logsumexp (2, B, H, L): the float32 number and what its rounding lost.

    Where a mask adds -1e9 or the lowest float to a whole row, the logarithm of the number of its keys is in the second.
    """
    return query.new_empty((2, *query.shape[:3]), dtype=torch.float32)


def empty_weights(query: Tensor, key: Tensor, average: bool) -> Tensor:
    batch, heads, rows, _ = query.shape
    shape = (batch, rows, key.shape[2]) if average else (batch, heads, rows, key.shape[2])
    return query.new_empty(shape)


def empty_like_heads_last(tensor: Tensor) -> Tensor:
    """Uninitialised (B, H, L, D) laid out as (B, L, H, D): the gradient of a head view of a projection."""
    return _heads_last(tensor, *tensor.shape)


def empty_mask_grads(masks: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """The gradients of those masks for which one is wanted, contiguous in the mask's own shape and dtype."""
    return [mask.new_empty(mask.shape) for mask, want in zip(masks, wanted, strict=True) if want and mask is not None]


def _heads_last(like: Tensor, batch: int, heads: int, rows: int, dim: int) -> Tensor:
    """No view of a (B, L, H, D) tensor: one made without gradients could not be changed in place with them later."""
    return like.new_empty_strided((batch, heads, rows, dim), (rows * heads * dim, dim, heads * dim, 1))
