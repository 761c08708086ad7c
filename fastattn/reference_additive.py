"""The eager definition of additive attention: plain PyTorch, differentiable to any order.

``scores`` holds the (B, Tq, Tk, D) tensor: it is the fallback that every call can take, and the second derivative.
``attend`` is all that follows the scores, for every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    coverage: Tensor | None,
    coverage_weight: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """S_ij = sum_d weight_d tanh(query_id + key_jd + coverage_ij coverage_weight_d), -inf where the mask is False.

    query (B, Tq, D), key (B, Tk, D), weight and coverage_weight (D), coverage (B, 1 or Tq, Tk), key_padding_mask
    (B, Tk) boolean -> (B, Tq, Tk) in float32, or float64 for float64 inputs.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    total = query.to(dtype).unsqueeze(2) + key.to(dtype).unsqueeze(1)
    if coverage is not None and coverage_weight is not None:
        total = total + coverage.to(dtype).unsqueeze(-1) * coverage_weight.to(dtype)
    # A sum, not a matrix product: autocast would round the operands of that.
    result = (total.tanh() * weight.to(dtype)).sum(-1)
    if key_padding_mask is not None:
        result = result.masked_fill(~key_padding_mask.unsqueeze(1), float("-inf"))
    return result


def attend(scores: Tensor, value: Tensor, masks: list[Tensor], *, padded: bool) -> tuple[Tensor, Tensor]:
    """Output (B, Tq, Dv) and weights (B, Tq, Tk) from scores (B, Tq, Tk), in value's dtype.

    ``masks`` broadcast to the scores: boolean, True takes part, or floating, added. ``padded``: scores may be -inf
    already. Rows without a key are 0.
    """
    if not masks and not padded:
        weights = scores.softmax(-1).to(value.dtype)
        return weights @ value, weights
    for mask in masks:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.to(scores.dtype)
    # A row without a key would be NaN: give it finite scores and weights 0, so that its gradients are 0.
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(value.dtype)
    return weights @ value, weights
