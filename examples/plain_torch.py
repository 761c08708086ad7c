"""A model of fastattn's modules with torch's own in their place: what the examples compare with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from fastattn.modules.memory import ProjectedKeys


class PlainMultiheadAttention(nn.MultiheadAttention):
    """torch's, whose ``is_causal`` needs the mask spelled out.

    Its output is a transposed view, over which dropout would draw in another order than over fastattn's.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("is_causal") and options.get("attn_mask") is None:
            length, others = query.shape[1], key.shape[1]
            options["attn_mask"] = torch.ones(length, others, dtype=torch.bool, device=query.device).triu(1)
        out, weights = super().forward(query, key, value, *args, **options)
        return out.contiguous(), weights


class PlainAdditiveAttention(fastattn.AdditiveAttention):
    """v^T tanh(W_q s_i + W_k h_j) with its (B, Tq, Tk, D) tensor."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        coverage: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        queries = query.unsqueeze(1) if query.dim() == 2 else query
        keys = key if isinstance(key, ProjectedKeys) else self.project_keys(key)
        hidden = self.query_projection(queries).unsqueeze(2) + keys.projection.unsqueeze(1)
        if coverage is not None:
            covered = coverage.unsqueeze(1) if coverage.dim() == 2 else coverage
            hidden = hidden + covered.unsqueeze(-1) * self.coverage_weight
        scores = torch.tanh(hidden) @ self.weight
        values = keys.key if value is None else value
        return _attend(scores, values, key_padding_mask, need_weights, query.dim() == 2)


class PlainLuongAttention(fastattn.LuongAttention):
    """s_i^T W h_j by two products of matrices. "concat" is additive attention, and left to it."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        coverage: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        if self.additive is not None:
            return self.additive(query, key, value, key_padding_mask, coverage, need_weights)
        queries = query.unsqueeze(1) if query.dim() == 2 else query
        keys = key.key if isinstance(key, ProjectedKeys) else key
        if self.projection is not None:
            queries = self.projection(queries)
        values = keys if value is None else value
        return _attend(queries @ keys.transpose(1, 2), values, key_padding_mask, need_weights, query.dim() == 2)


def _attend(scores: Tensor, values: Tensor, tokens: Tensor | None, need_weights: bool, step: bool) -> Any:
    """softmax(scores) values; scores (B, Tq, Tk), values (B, Tk, D), tokens (B, Tk), True takes part."""
    if tokens is not None:
        scores = scores.masked_fill(~tokens.unsqueeze(1), -math.inf)
    weights = scores.softmax(-1)
    out = weights @ values
    if step:
        out, weights = out.squeeze(1), weights.squeeze(1)
    return (out, weights) if need_weights else out


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    fastattn.LSTM: nn.LSTM,
    fastattn.LSTMCell: nn.LSTMCell,
    fastattn.MultiheadAttention: PlainMultiheadAttention,
    fastattn.AdditiveAttention: PlainAdditiveAttention,
    fastattn.LuongAttention: PlainLuongAttention,
}


def plain_torch(model: nn.Module) -> nn.Module:
    """The model, with torch's modules in place of fastattn's, in place.

    A module changes its class alone: the parameters, which have the same names and shapes in both, stay the same
    objects, also in an optimizer. Decoding a Transformer from its cache remains fastattn's.
    """
    for module in model.modules():
        plain = _PLAIN.get(type(module))
        if plain is not None:
            module.__class__ = plain
    return model
