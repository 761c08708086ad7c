"""torch's own fused attention, held to our semantics: fully masked rows give 0, masks may be mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference import band

# Bound at import: a program may rebind torch.nn.functional.scaled_dot_product_attention to ours.
_scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    lower: int | None = None,
    upper: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Output (B, H, L, Dv); arguments as in ``fastattn.reference.attention``."""
    groups = False
    if query.shape[1] != key.shape[1]:  # a branch, because torch takes no symbolic bool here
        groups = True
    if scale <= 0.0:
        # torch's fused causal kernels multiply -inf by the scale: one that is not positive makes NaN of it.
        query, scale = (-query, -scale) if scale else (query * 0.0, 1.0)
    if key.shape[2] == 0:
        return value.new_zeros(*query.shape[:3], value.shape[-1]) + 0.0 * query.sum()
    if attn_mask is None and key_padding_mask is None and lower is None and (upper is None or upper == 0):
        return _scaled_dot_product_attention(
            query, key, value, dropout_p=dropout_p, is_causal=upper is not None, scale=scale, enable_gqa=groups
        )
    mask = attn_mask
    if key_padding_mask is not None:
        mask = _both(mask, key_padding_mask[:, None, None, :])
    if lower is not None or upper is not None:
        mask = _both(mask, band(query.shape[2], key.shape[2], lower, upper, query.device)[None, None])
    assert mask is not None
    # A fully masked row is NaN in some of torch's kernels: attend everywhere there, then write 0 (and gradient 0).
    if mask.dtype == torch.bool:
        empty = ~mask.any(-1, keepdim=True)
        mask = mask | empty
    else:
        empty = (mask == float("-inf")).all(-1, keepdim=True)
        mask = mask.masked_fill(empty, 0.0)
    mask = mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1, query.shape[2], key.shape[2])))
    out = _scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=groups
    )
    return out.masked_fill(empty, 0.0)


def _both(first: Tensor | None, second: Tensor) -> Tensor:
    """One mask that applies both; each is boolean (True takes part) or floating (added)."""
    if first is None:
        return second
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first & second
    if second.dtype == torch.bool:
        return first.masked_fill(~second, float("-inf"))
    if first.dtype == torch.bool:
        return second.masked_fill(~first, float("-inf"))
    return first + second
