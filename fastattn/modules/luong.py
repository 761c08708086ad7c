"""Luong attention: the three scores of Luong, Pham and Manning 2015."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.additive_validation import autocast_dtype
from fastattn.functional import scaled_dot_product_attention
from fastattn.modules import memory
from fastattn.modules.additive import AdditiveAttention
from fastattn.modules.memory import ProjectedKeys

_SCORES = ("dot", "general", "concat")


class LuongAttention(nn.Module):
    """Global attention (Luong, Pham and Manning 2015, section 3.1) of a decoder's states over an encoder's.

        dot      e_ij = s_i^T h_j                                  query_dim = key_dim
        general  e_ij = s_i^T W_a h_j
        concat   e_ij = v_a^T tanh(W_a [s_i; h_j])
        a = softmax_j(e),   out_i = sum_j a_ij value_j

    dot and general are ``scaled_dot_product_attention`` with one head and scale 1; general multiplies the query by
    W_a, so that the keys need no copy. concat is additive attention: W_a of the concatenation is one projection of
    the query and one of the key; W_a has query_dim rows. As in the functions of this package, a boolean mask is True
    where a key takes part.

    Args:
        query_dim: features of the queries s.
        key_dim: features of the keys h.
        score: "dot", "general" or "concat".
        coverage: add w_c c_ij under the tanh (See, Liu and Manning 2017, equation 11); of "concat" only.
        device, dtype: of the parameters.

    Attributes:
        projection: nn.Linear without bias, W_a^T, or None; of "general".
        additive: AdditiveAttention, or None; of "concat".

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        score: str = "dot",
        *,
        coverage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        memory.check_sizes(query_dim=query_dim, key_dim=key_dim)
        if score not in _SCORES:
            raise ValueError(f"score: got {score!r}, allowed are {', '.join(map(repr, _SCORES))}")
        if score == "dot" and query_dim != key_dim:
            raise ValueError(f"key_dim: got {key_dim}, expected query_dim = {query_dim} for score='dot'")
        if coverage and score != "concat":
            raise ValueError(f"coverage: got True with score={score!r}, allowed with score='concat' only")
        self.query_dim, self.key_dim, self.score = query_dim, key_dim, score
        self.projection: nn.Linear | None = None
        self.additive: AdditiveAttention | None = None
        if score == "general":
            self.projection = nn.Linear(query_dim, key_dim, bias=False, device=device, dtype=dtype)
        elif score == "concat":
            self.additive = AdditiveAttention(
                query_dim, key_dim, query_dim, bias=False, coverage=coverage, device=device, dtype=dtype
            )

    def project_keys(self, key: Tensor) -> ProjectedKeys:
        """What "concat" needs of keys (B, Tk, key_dim), to be passed as ``key``; the other scores take them as is.

        Raises TypeError or ValueError for another shape.
        """
        if self.additive is not None:
            return self.additive.project_keys(key)
        memory.check_tensor("key", key, self.key_dim)
        return ProjectedKeys(key, key)

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        coverage: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Attention of ``query`` over ``key``; arguments, results and errors are those of ``AdditiveAttention``.

        Args:
            query: (B, Tq, query_dim), or (B, query_dim) for one step of a decoder.
            key: (B, Tk, key_dim), or what ``project_keys`` returned for it.
            value: (B, Tk, Dv); None is the keys.
            key_padding_mask: (B, Tk), boolean, True takes part, or floating, added to the scores.
            coverage: (B, Tk) or (B, Tq, Tk); None is 0, as at the first step.
            need_weights: also return the weights.

        Returns:
            The output (B, Tq, Dv), or (B, Dv) for one step; with ``need_weights`` a pair of it and the weights
            (B, Tq, Tk), or (B, Tk). A query whose keys are all masked has output 0, weights 0.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        if self.additive is not None:
            return self.additive(query, key, value, key_padding_mask, coverage, need_weights)
        memory.check_step(query, key, value, self.query_dim, self.key_dim)
        if coverage is not None:
            raise ValueError(f"coverage: got a tensor, expected None with score={self.score!r}")
        step = query.dim() == 2
        keys = key.key if isinstance(key, ProjectedKeys) else key
        queries = query.unsqueeze(1) if step else query
        if self.projection is not None:
            queries = self.projection(queries)
        values = keys if value is None else value
        dtype = autocast_dtype(query)
        if dtype is not None:  # of which W_a has cast the query alone
            queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
        # One head: (B, 1, T, D).
        result = scaled_dot_product_attention(
            queries.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), scale=1.0,
            key_padding_mask=key_padding_mask, need_weights=need_weights,
        )  # fmt: skip
        if need_weights:
            return memory.drop_step((result[0].squeeze(1), result[1]), step)
        return memory.drop_step(result.squeeze(1), step)

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, score={self.score!r}"
