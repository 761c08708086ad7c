"""The eager definition of every op: plain PyTorch, every feature, differentiable to any order.

It is the oracle of the tests (called with float64 tensors) and the fallback of the dispatcher. It holds the
(batch, heads, L, S) scores in memory.
"""

from __future__ import annotations

from typing import Any

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
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    shift: int = 0,
    segment_query: Tensor | None = None,
    segment_key: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention with every mask written out.

        c_ij = scale * <q_i, k_j>,   with softcap > 0:  c_ij = softcap * tanh(scale * <q_i, k_j> / softcap)
        S_ij = c_ij + attn_mask_ij + key_padding_mask_j - slope |i + shift - j|   (boolean masks: -inf where False)
        S_ij = -inf outside the band  lower <= j - i <= upper  and where segment_query_i != segment_key_j
        LSE_i = log(exp sink + sum_j exp S_ij),   P_ij = exp(S_ij - LSE_i)
        rows without a key: P = 0, LSE = -inf, or the sink
        W_ij = P_ij * keep_ij / (1 - dropout_p),   O_i = sum_j W_ij v_j

    Shapes: query (B, H, L, D); key (B, Hkv, S, D), value (B, Hkv, S, Dv) with H a multiple of Hkv; attn_mask
    broadcastable to (B, H, L, S); key_padding_mask (B, S); alibi_slopes (B or 1, H); segment_query (B, L) and
    segment_key (B, S) integers; sinks (H). In a boolean mask True takes part. The arithmetic is in ``compute_dtype``:
    float32 by default, float64 for float64 inputs.

    Sources: softcap, Gemma 2 (2024), section 2; slopes, Press et al., ALiBi (2021); sinks, Xiao et al. (2023), learned
    per head as in gpt-oss (2025).

    Returns output (B, H, L, Dv) in query's dtype, LSE (B, H, L) and weights W (B, H, L, S), the last two in the
    dtype of the arithmetic.
    """
    scores = _scores(
        query, key, scale=scale, attn_mask=attn_mask, key_padding_mask=key_padding_mask, lower=lower, upper=upper,
        softcap=softcap, alibi_slopes=alibi_slopes, shift=shift, segment_query=segment_query, segment_key=segment_key,
        compute_dtype=compute_dtype,
    )  # fmt: skip
    # A row without a key would be NaN: give it finite scores, and its results by hand, so that its gradients are 0.
    empty = (scores == float("-inf")).all(-1)
    scores = scores.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)  # no key: 0, and still part of the graph
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None].expand_as(lse)
        lse = torch.where(empty, sink, torch.logaddexp(lse, sink))
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(empty.unsqueeze(-1), 0.0)
    if sinks is None:
        lse = lse.masked_fill(empty, float("-inf"))
    weights = _dropped(weights, seed, dropout_p)
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups > 1:
        value = value.repeat_interleave(groups, dim=1)
    return (weights @ value.to(weights.dtype)).to(query.dtype), lse, weights


def attention_weights(
    query: Tensor, key: Tensor, lse: Tensor, *, seed: Tensor | None = None, dropout_p: float = 0.0, **scoring: Any
) -> Tensor:
    """W (B, H, L, S) as a function of a given LSE (B, H, L): P_ij = exp(S_ij - LSE_i); arguments as ``attention``'s."""
    scores = _scores(query, key, **scoring)
    masked = scores == float("-inf")
    scores = scores.masked_fill(masked, 0.0) - torch.where(lse > float("-inf"), lse, 0.0).unsqueeze(-1)
    return _dropped(scores.masked_fill(masked, float("-inf")).exp(), seed, dropout_p)


def _scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    lower: int | None = None,
    upper: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    shift: int = 0,
    segment_query: Tensor | None = None,
    segment_key: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """S (B, H, L, S) in the dtype of the arithmetic."""
    compute = compute_dtype or (torch.float64 if query.dtype == torch.float64 else torch.float32)
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
    scores = (query.to(compute) * scale) @ key.to(compute).transpose(-1, -2)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _masked(scores, attn_mask)
    if key_padding_mask is not None:
        scores = _masked(scores, key_padding_mask[:, None, None, :])
    if alibi_slopes is not None:
        distance = _distance(query.shape[2], key.shape[2], query.device) - shift
        scores = scores - alibi_slopes.to(compute)[:, :, None, None] * distance.abs()
    if segment_query is not None and segment_key is not None:
        scores = _masked(scores, segment_query[:, None, :, None] == segment_key[:, None, None, :])
    if lower is not None or upper is not None:
        scores = _masked(scores, band(query.shape[2], key.shape[2], lower, upper, query.device))
    return scores


def _dropped(weights: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if dropout_p == 0.0:
        return weights
    assert seed is not None
    keep = dropout_keep(seed, dropout_p, *weights.shape)
    return weights.masked_fill(~keep, 0.0) * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


def band(rows: int, columns: int, lower: int | None, upper: int | None, device: torch.device) -> Tensor:
    """Boolean (rows, columns): True where lower <= column - row <= upper; None leaves that side open."""
    distance = _distance(rows, columns, device)
    inside = torch.ones_like(distance, dtype=torch.bool)
    if lower is not None:
        inside = inside & (distance >= lower)
    if upper is not None:
        inside = inside & (distance <= upper)
    return inside


def _distance(rows: int, columns: int, device: torch.device) -> Tensor:
    """column - row, (rows, columns)."""
    return torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None]


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(scores.dtype)
