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


class _PlainAttention(nn.Module):
    """softmax(scores) values of a module with ``project_keys`` and ``scores``."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        coverage: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Arguments and results as of fastattn's modules; key_padding_mask (B, Tk) is boolean, True takes part."""
        step = query.dim() == 2
        keys = key if isinstance(key, ProjectedKeys) else self.project_keys(key)
        scores = self.scores(query.unsqueeze(1) if step else query, keys.projection, coverage)  # (B, Tq, Tk)
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask.unsqueeze(1), -math.inf)
        weights = scores.softmax(-1)
        out = weights @ (keys.key if value is None else value)
        if step:
            out, weights = out.squeeze(1), weights.squeeze(1)
        return (out, weights) if need_weights else out


class PlainAdditiveAttention(_PlainAttention, fastattn.AdditiveAttention):
    """v^T tanh(W_q s_i + W_k h_j) with its (B, Tq, Tk, D) tensor."""

    def scores(self, queries: Tensor, projection: Tensor, coverage: Tensor | None) -> Tensor:
        hidden = self.query_projection(queries).unsqueeze(2) + projection.unsqueeze(1)
        if coverage is not None:
            covered = coverage.unsqueeze(1) if coverage.dim() == 2 else coverage
            hidden = hidden + covered.unsqueeze(-1) * self.coverage_weight
        return torch.tanh(hidden) @ self.weight


class PlainLuongAttention(_PlainAttention, fastattn.LuongAttention):
    """s_i^T W h_j by two products of matrices. "concat" is additive attention, and left to it."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options) if self.additive is None else self.additive(*args, **options)

    def scores(self, queries: Tensor, keys: Tensor, coverage: None) -> Tensor:
        if self.projection is not None:
            queries = self.projection(queries)
        return queries @ keys.transpose(1, 2)


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
