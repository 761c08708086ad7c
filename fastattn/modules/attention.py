"""Multi-head attention with nn.MultiheadAttention's constructor, forward, parameters and exceptions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import MultiheadAttention as TorchMultiheadAttention
from torch.nn import init
from torch.nn.utils.parametrize import is_parametrized

from fastattn.dispatch import Explanation
from fastattn.functional import explain, scaled_dot_product_attention
from fastattn.modules import checks, masks, nested, projection
from fastattn.modules.linear import linear


class MultiheadAttention(TorchMultiheadAttention):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), a drop-in for ``torch.nn.MultiheadAttention``.

    The constructor and the state_dict are torch's; checkpoints load strictly both ways. What differs from torch:

    - A query whose keys are all masked gives 0 before ``out_proj``, weights 0 and finite gradients, never NaN.
    - ``is_causal`` needs no ``attn_mask`` and works with weights and padding; where both are given both apply, so a
      causal ``attn_mask`` changes nothing and any other one is never ignored.
    - Boolean and floating masks may be mixed; each keeps its dtype, under autocast too.
    - Training and evaluation run the same code: torch's private inference path is never taken.
    - Without ``batch_first`` the output may be a transposed view of (B, L, E), as torch's is with ``batch_first``.

    Attributes:
        need_weights: None follows the caller of ``forward``; False returns no weights whatever the caller asks.
    """

    need_weights: bool | None = None

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # nn.TransformerEncoderLayer and nn.TransformerEncoder ask this of a complete module to decide whether to
        # compute attention from its parameters without calling it. torch's constructor asks what is true.
        return "out_proj" not in self._modules and self._packed

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        # Where a module of torch's class has it: the two classes can take over each other's __dict__.
        self.__dict__["_qkv_same_embed_dim"] = same

    @property
    def _packed(self) -> bool:
        """Whether one weight, in_proj_weight, stacks the three input projections."""
        return bool(self.kdim == self.embed_dim and self.vdim == self.embed_dim)

    def _reset_parameters(self) -> None:
        """torch's initialisation, drawn in torch's order."""
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in (self.in_proj_weight,) if self._packed else separate:
            init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            init.zeros_(self.in_proj_bias)
            init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                init.xavier_normal_(bias)

    @classmethod
    def from_torch(cls, module: TorchMultiheadAttention, need_weights: bool | None = None) -> MultiheadAttention:
        """A module that shares everything with ``module``: parameters, buffers, hooks, parametrizations, mode.

        Nothing is allocated and no random number drawn. The dictionaries of parameters, buffers and hooks are the
        same objects, so a later ``to()``, ``load_state_dict`` or hook reaches both.

        Args:
            module: a torch.nn.MultiheadAttention whose forward is torch's own.
            need_weights: False when callers throw the weights away, see ``need_weights`` of this class.

        Raises:
            TypeError: ``module`` is something else, or computes in its own way.
        """
        if not isinstance(module, TorchMultiheadAttention):
            raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.MultiheadAttention")
        own_forward = type(module).forward not in (TorchMultiheadAttention.forward, cls.forward)
        if own_forward or "forward" in module.__dict__:
            raise TypeError(f"module: got a {type(module).__name__} with a forward of its own, expected torch's")
        new = cls.__new__(_with_parametrizations(cls, module))
        new.__dict__.update(module.__dict__)
        # Compiled for the other module's forward.
        new.__dict__.pop("_compiled_call_impl", None)
        new.need_weights = need_weights
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value``.

        Args:
            query: (L, B, E), (B, L, E) with ``batch_first``, (L, E) without a batch, or nested with ``batch_first``;
                float16, bfloat16, float32 or float64.
            key, value: (S, B, kdim) and (S, B, vdim), laid out as query is.
            key_padding_mask: (B, S), or (S) without a batch; boolean, True is ignored, or floating, added to scores.
            need_weights: return the weights too. The output is computed without a (B, H, L, S) tensor either way
                where a fused backend serves the call; ``explain`` tells.
            attn_mask: (L, S) or (B * num_heads, L, S); boolean, True is ignored, or floating, added to the scores.
            average_attn_weights: weights are averaged over the heads, or given per head.
            is_causal: query i sees keys j <= i, and the keys of add_bias_kv and add_zero_attn.

        Returns:
            The output, shaped as query, and the weights after dropout, (B, L, S) averaged or (B, H, L, S), without
            B when unbatched, or None. S counts the keys of add_bias_kv and add_zero_attn.

        Raises:
            AssertionError, RuntimeError, TypeError: as torch's module does, naming the argument.
            ValueError: ``dropout`` is no probability.
        """
        if self.need_weights is not None:
            need_weights = self.need_weights
        batched, arguments = self._arguments(query, key, value, key_padding_mask, attn_mask, is_causal)
        result = scaled_dot_product_attention(
            **arguments, need_weights=need_weights, average_weights=average_attn_weights
        )
        heads, weights = result if need_weights else (result, None)
        out = self._merge(heads, self.batch_first or not batched)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        if query.is_nested:
            return nested.nest(out, query), None if weights is None else nested.drop_padding(weights, query)
        return out, weights

    def attend_within(self, x: Tensor, segment_ids: Tensor) -> Tensor:
        """Self-attention of x (1, L, E) in which a token sees those of its own of ``segment_ids`` (1, L), no other.

        For evaluation: nothing is dropped.
        """
        query, key, value = self._project(x, x, x, True)
        return self._merge(scaled_dot_product_attention(query, key, value, segment_ids=segment_ids), True)

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Explanation:
        """The backend that ``forward`` takes for these arguments, and why not each other one.

        Takes the arguments of ``forward`` and raises its errors; runs the input projections, not the attention.
        """
        if self.need_weights is not None:
            need_weights = self.need_weights
        with torch.no_grad():
            _, arguments = self._arguments(query, key, value, key_padding_mask, attn_mask, is_causal)
        return explain(**arguments, need_weights=need_weights, average_weights=average_attn_weights)

    def _arguments(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[bool, dict[str, Any]]:
        """Whether the call is batched, and what ``scaled_dot_product_attention`` is to be given."""
        checks.check_tensors(query, key, value)
        if query.is_nested or key.is_nested or value.is_nested:
            query, key, value, key_padding_mask = nested.pad(
                query, key, value, key_padding_mask, attn_mask, self.batch_first
            )
        batched = checks.check_ranks(query, key, value, key_padding_mask, attn_mask)
        checks.check_features(query, key, value, self.embed_dim, self.kdim, self.vdim)
        batch_first = self.batch_first or not batched
        if not batched:
            query, key, value = _as_batch_of_one(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        checks.check_lengths(query, key, value, key_padding_mask, attn_mask, self.num_heads, batch_first, batched)
        q, k, v = self._project(query, key, value, batch_first)
        attn_mask = masks.taking_part(attn_mask)
        key_padding_mask = masks.taking_part(key_padding_mask)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(q.shape[0], self.num_heads, *attn_mask.shape[1:])
        if self.bias_k is not None or self.add_zero_attn:
            if is_causal:
                attn_mask = masks.with_triangle(attn_mask, q.shape[2], k.shape[2], q.device)
                is_causal = False
            k, v, count = projection.append_keys(k, v, self.bias_k, self.bias_v, self.add_zero_attn)
            attn_mask = masks.with_open_columns(attn_mask, count)
            key_padding_mask = masks.with_open_columns(key_padding_mask, count)
        return batched, {
            "query": q,
            "key": k,
            "value": v,
            "attn_mask": attn_mask,
            "dropout_p": self.dropout if self.training else 0.0,
            "is_causal": is_causal,
            "key_padding_mask": key_padding_mask,
        }

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> list[Tensor]:
        """Queries, keys and values (B, H, L, D) of batched inputs."""
        if self._packed:
            # Read once: a parametrized weight is computed at each reading.
            weight = self.in_proj_weight
            checks.check_dtypes(query, key, value, weight)
            return projection.packed(query, key, value, weight, self.in_proj_bias, self.num_heads, batch_first)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        checks.check_dtypes(query, key, value, weights[0])
        return projection.separate((query, key, value), weights, self.in_proj_bias, self.num_heads, batch_first)

    def _merge(self, heads: Tensor, batch_first: bool) -> Tensor:
        """The output projection of (B, H, L, D), in the layout that the input has."""
        # The kernels write (B, L, H, D), or (L, B, H, D) as some of torch's do for such queries: merging is a view.
        merged = heads.transpose(1, 2).flatten(2)
        if batch_first:
            return linear(merged, self.out_proj.weight, self.out_proj.bias)
        time_first = merged.transpose(0, 1)
        if time_first.is_contiguous():
            return linear(time_first, self.out_proj.weight, self.out_proj.bias)
        return linear(merged, self.out_proj.weight, self.out_proj.bias).transpose(0, 1)


def _as_batch_of_one(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L, E) as (1, L, E); inputs that are one tensor stay one."""
    batch_query = query.unsqueeze(0)
    batch_key = batch_query if key is query else key.unsqueeze(0)
    if value is query:
        return batch_query, batch_key, batch_query
    return batch_query, batch_key, batch_key if value is key else value.unsqueeze(0)


def _with_parametrizations(cls: type[MultiheadAttention], module: TorchMultiheadAttention) -> type[MultiheadAttention]:
    """``cls``, or a class of its own over it where ``module`` has one: parametrized weights are properties there."""
    if not is_parametrized(module):
        return cls
    own = {name: item for name, item in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{cls.__name__}", (cls,), own)
