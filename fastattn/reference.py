"""The eager definition of every op: plain PyTorch, every feature, differentiable to any order.

It is the oracle of the tests (called with float64 tensors) and the fallback of the dispatcher. It holds the
(batch, heads, L, S) scores in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.philox import dropout_keep


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
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention with every mask written out.

        S_ij = scale * <q_i, k_j> + attn_mask_ij + key_padding_mask_j   (boolean masks: -inf where False)
        S_ij = -inf outside the band  lower <= j - i <= upper
        LSE_i = log sum_j exp S_ij,   P_ij = exp(S_ij - LSE_i),   rows without a key: P = 0, LSE = -inf
        W_ij = P_ij * keep_ij / (1 - dropout_p),   O_i = sum_j W_ij v_j

    Shapes: query (B, H, L, D); key (B, Hkv, S, D), value (B, Hkv, S, Dv) with H a multiple of Hkv; attn_mask
    broadcastable to (B, H, L, S); key_padding_mask (B, S). In a boolean mask True takes part. The arithmetic is in
    ``compute_dtype``: float32 by default, float64 for float64 inputs.

    Returns output (B, H, L, Dv) in query's dtype, LSE (B, H, L) and weights W (B, H, L, S), the last two in the
    dtype of the arithmetic.
    """
    compute = compute_dtype or (torch.float64 if query.dtype == torch.float64 else torch.float32)
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scores = (query.to(compute) * scale) @ key.to(compute).transpose(-1, -2)
    scores = _masked(scores, attn_mask)
    if key_padding_mask is not None:
        scores = _masked(scores, key_padding_mask[:, None, None, :])
    if lower is not None or upper is not None:
        scores = _masked(scores, band(query.shape[2], key.shape[2], lower, upper, query.device))
    # A row without a key would be NaN: give it finite scores, and its results by hand, so that its gradients are 0.
    empty = (scores == float("-inf")).all(-1)
    scores = scores.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)  # no key: 0, and still part of the graph
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(empty.unsqueeze(-1), 0.0)
    lse = lse.masked_fill(empty, float("-inf"))
    if dropout_p > 0.0:
        assert seed is not None
        keep = dropout_keep(seed, dropout_p, *weights.shape)
        weights = weights.masked_fill(~keep, 0.0) * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
    return (weights @ value.to(compute)).to(query.dtype), lse, weights


def band(rows: int, columns: int, lower: int | None, upper: int | None, device: torch.device) -> Tensor:
    """Boolean (rows, columns): True where lower <= column - row <= upper; None leaves that side open."""
    distance = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None]
    inside = torch.ones_like(distance, dtype=torch.bool)
    if lower is not None:
        inside = inside & (distance >= lower)
    if upper is not None:
        inside = inside & (distance <= upper)
    return inside


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(scores.dtype)
