"""The derivatives of the operators' derivatives: by the eager definition, which is differentiable to any order.

Right and slow: that of attention holds the (B, H, L, S) scores, that of the LSTM walks the steps in Python. Importing
this module gives them to the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference, reference_lstm
from fastattn.kernels.attention import autograd
from fastattn.kernels.lstm import autograd as lstm_autograd

_NAMES = (
    "attn_mask", "key_padding_mask", "alibi_slopes", "segment_query", "segment_key", "seed", "dropout_p", "scale",
    "softcap", "shift", "lower", "upper",
)  # fmt: skip


def _attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logsumexp (2, B, H, L) and weights."""
    *problem, average = rest
    out, lse, weights = reference.attention(
        query, key, value, sinks=sinks, **dict(zip(_NAMES, problem, strict=True))
    )
    logsumexp = torch.stack((lse, torch.zeros_like(lse)))
    return out, logsumexp, (weights.mean(1) if average else weights).to(out.dtype)


def _weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> tuple[Tensor]:
    *problem, average = rest
    weights = reference.attention_weights(
        query, key, logsumexp[0] + logsumexp[1].detach(), **dict(zip(_NAMES, problem, strict=True))
    )
    return ((weights.mean(1) if average else weights).to(query.dtype),)


autograd.second_derivative.update(attention=_attention, weights=_weights)
lstm_autograd.second_derivative["layer"] = reference_lstm.lstm_layer
