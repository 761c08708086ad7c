"""Additive (Bahdanau) attention with its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.additive import additive_attention
from fastattn.modules import memory
from fastattn.modules.memory import ProjectedKeys


class AdditiveAttention(nn.Module):
    """Additive attention (Bahdanau, Cho and Bengio 2015, section A.1.2) of a decoder's states over an encoder's.

        e_ij = v^T tanh(W_q s_i + W_k h_j + b + w_c c_ij),   a = softmax_j(e),   out_i = sum_j a_ij value_j

    The coverage c (See, Liu and Manning 2017, equation 11) counts with ``coverage=True``. Unlike
    ``MultiheadAttention`` and like the functions of this package, a boolean mask is True where a key takes part.

    Args:
        query_dim: features of the queries s.
        key_dim: features of the keys h.
        hidden_dim: features of the sum under tanh.
        bias: add b. It belongs to the keys' projection, which a decoder computes once.
        coverage: have w_c, and take ``coverage`` in ``forward``.
        device, dtype: of the parameters.

    Attributes:
        query_projection, key_projection: nn.Linear, W_q without and W_k with the bias.
        weight: v, (hidden_dim).
        coverage_weight: w_c, (hidden_dim), or None.

    Raises:
        TypeError, ValueError: a size is no integer of at least 1.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        bias: bool = True,
        coverage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        memory.check_sizes(query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        self.query_dim, self.key_dim, self.hidden_dim = query_dim, key_dim, hidden_dim
        self.query_projection = nn.Linear(query_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.key_projection = nn.Linear(key_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.coverage_weight: nn.Parameter | None = None
        if coverage:
            self.coverage_weight = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again: the projections as nn.Linear does, v and w_c from U(+-1 / sqrt(hidden_dim))."""
        self.query_projection.reset_parameters()
        self.key_projection.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        for parameter in (self.weight, self.coverage_weight):
            if parameter is not None:
                memory.uniform_(parameter, self.hidden_dim)

    def project_keys(self, key: Tensor) -> ProjectedKeys:
        """The projections of keys (B, Tk, key_dim), to be passed as ``key``: a decoder computes them once.

        Raises TypeError or ValueError for another shape.
        """
        memory.check_tensor("key", key, self.key_dim)
        return ProjectedKeys(key, self.key_projection(key))

    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        coverage: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Attention of ``query`` over ``key``.

        Args:
            query: (B, Tq, query_dim), or (B, query_dim) for one step of a decoder.
            key: (B, Tk, key_dim), or what ``project_keys`` returned for it.
            value: (B, Tk, Dv); None is the keys, before their projection.
            key_padding_mask: (B, Tk), boolean, True takes part, or floating, added to the scores.
            coverage: (B, Tk) or (B, Tq, Tk); None is 0, as at the first step.
            need_weights: also return the weights.

        Returns:
            The output (B, Tq, Dv), or (B, Dv) for one step; with ``need_weights`` a pair of it and the weights
            (B, Tq, Tk), or (B, Tk). A query whose keys are all masked has output 0, weights 0.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        memory.check_step(query, key, value, self.query_dim, self.key_dim)
        if coverage is not None and self.coverage_weight is None:
            raise ValueError("coverage: got a tensor, expected None: the module was made without coverage=True")
        step = query.dim() == 2
        projected = key if isinstance(key, ProjectedKeys) else self.project_keys(key)
        result = additive_attention(
            self.query_projection(query.unsqueeze(1) if step else query),
            projected.projection,
            projected.key if value is None else value,
            self.weight,
            key_padding_mask=key_padding_mask,
            coverage=coverage,
            coverage_weight=None if coverage is None else self.coverage_weight,
            need_weights=need_weights,
        )
        return memory.drop_step(result, step)

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, {self.hidden_dim}, coverage={self.coverage_weight is not None}"
