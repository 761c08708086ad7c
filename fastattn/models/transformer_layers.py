"""One layer of a Transformer, in training and with a KV cache, and the embeddings before the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import MultiheadAttention as TorchMultiheadAttention
from torch.nn import functional

from fastattn.additive_validation import autocast_dtype
from fastattn.kv_cache import attention_with_kv_cache
from fastattn.models.transformer_config import TransformerConfig
from fastattn.modules.positional import SinusoidalPositionalEncoding

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer: its own tokens', written in place, and the encoder's, each (N, H, S, D)."""

    own: tuple[Tensor, Tensor]
    memory: tuple[Tensor, Tensor] | None

    def rows(self, index: Tensor) -> LayerCache:
        """The cache of rows ``index`` (M,)."""
        return LayerCache(_rows(self.own, index), None if self.memory is None else _rows(self.memory, index))


class TransformerLayer(nn.Module):
    """Self-attention, attention over an encoder where ``cross``, and an MLP, each with a norm and a residual."""

    def __init__(self, config: TransformerConfig, cross: bool, attention: type[TorchMultiheadAttention]) -> None:
        super().__init__()
        self.norm_first, self.activation = config.norm_first, config.activation
        dropped = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.self_attn = attention(config.dim, config.num_heads, dropout=dropped, batch_first=True)
        self.self_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.cross_attn: TorchMultiheadAttention | None = None
        self.cross_norm: nn.LayerNorm | None = None
        if cross:
            self.cross_attn = attention(config.dim, config.num_heads, dropout=dropped, batch_first=True)
            self.cross_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.linear1 = nn.Linear(config.dim, config.hidden_dim)
        self.linear2 = nn.Linear(config.hidden_dim, config.dim)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        causal: bool,
        padding: Tensor | None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """(B, L, E) of x (B, L, E); memory is the encoder's (B, S, E), paddings are (B, L) and (B, S), True ignored."""

        def own(y: Tensor) -> Tensor:
            return _attend(self.self_attn, y, y, padding, causal)

        def cross(attention: nn.Module, y: Tensor) -> Tensor:
            return _attend(attention, y, memory, memory_padding, False)

        return self._sublayers(x, own, cross)

    def step(self, x: Tensor, cache: LayerCache, lengths: Tensor, memory_lengths: Tensor | None) -> Tensor:
        """(N, T, E) of the T newest tokens x (N, T, E), whose keys and values are written behind ``lengths`` (N,)."""

        def own(y: Tensor) -> Tensor:
            query, key, value = _project(self.self_attn, y, 0, 3)
            return _merge(
                self.self_attn, attention_with_kv_cache(query, *cache.own, lengths, new_key=key, new_value=value)
            )

        def cross(attention: TorchMultiheadAttention, y: Tensor) -> Tensor:
            assert cache.memory is not None
            assert memory_lengths is not None
            (query,) = _project(attention, y, 0, 1)
            return _merge(
                attention, attention_with_kv_cache(query, *cache.memory, memory_lengths, is_causal=False)
            )  # fmt: skip

        return self._sublayers(x, own, cross)

    def open_cache(self, rows: int, room: int, memory: Tensor | None) -> LayerCache:
        """A cache for ``rows`` sequences of at most ``room`` tokens, with the keys and values of memory (N, S, E)."""
        weight, heads = self.self_attn.in_proj_weight, self.self_attn.num_heads
        shape = (rows, heads, room, weight.shape[1] // heads)
        dtype = autocast_dtype(weight) or weight.dtype
        keys, values = (torch.empty(shape, dtype=dtype, device=weight.device) for _ in range(2))
        if memory is None or self.cross_attn is None:
            return LayerCache((keys, values), None)
        memory_key, memory_value = _project(self.cross_attn, memory, 1, 3)
        return LayerCache((keys, values), (memory_key, memory_value))

    def _sublayers(self, x: Tensor, own: Callable[[Tensor], Tensor], cross: Callable[[Any, Tensor], Tensor]) -> Tensor:
        x = self._residual(x, self.self_norm, own)
        if self.cross_norm is not None:
            x = self._residual(x, self.cross_norm, partial(cross, self.cross_attn))
        return self._residual(x, self.mlp_norm, self._mlp)

    def _residual(self, x: Tensor, norm: nn.LayerNorm, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = x + self.dropout(sublayer(norm(x))) if self.norm_first else norm(x + self.dropout(sublayer(x)))
        return out

    def _mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(_ACTIVATIONS[self.activation](self.linear1(x)))
        return out


class Embeddings(nn.Module):
    """Tokens, their positions and, for BERT, their segments, as vectors."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.dim)
        self.positions: nn.Module
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, config.dim)
        else:
            self.positions = SinusoidalPositionalEncoding(config.dim)
        self.types = nn.Embedding(config.token_types, config.dim) if config.token_types else None
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.norm_embeddings else None
        self.dropout = nn.Dropout(config.dropout)
        self.factor = config.dim**0.5 if config.scale_embeddings else 1.0

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor | None = None) -> Tensor:
        """(B, L, E) of tokens (B, L) at positions (L) or (B, L), in segments token_types (B, L); None is all 0."""
        x: Tensor = self.tokens(tokens)
        if self.factor != 1.0:
            x = x * self.factor
        if isinstance(self.positions, SinusoidalPositionalEncoding):
            x = self.positions(x, positions)
        else:
            x = x + self.positions(positions)
        if self.types is not None:
            x = x + (self.types.weight[0] if token_types is None else self.types(token_types))
        if self.norm is not None:
            x = self.norm(x)
        dropped: Tensor = self.dropout(x)
        return dropped


def _attend(attention: nn.Module, x: Tensor, memory: Tensor | None, padding: Tensor | None, causal: bool) -> Tensor:
    out: Tensor = attention(x, memory, memory, key_padding_mask=padding, need_weights=False, is_causal=causal)[0]
    return out


def _project(attention: TorchMultiheadAttention, x: Tensor, first: int, end: int) -> Sequence[Tensor]:
    """Those of queries, keys and values with numbers from ``first`` to ``end``, (N, H, T, D), of x (N, T, E)."""
    part = slice(first * attention.embed_dim, end * attention.embed_dim)
    both = functional.linear(x, attention.in_proj_weight[part], attention.in_proj_bias[part])
    heads: Tensor = both.unflatten(-1, (end - first, attention.num_heads, -1))
    return heads.transpose(1, 3).unbind(2)


def _merge(attention: TorchMultiheadAttention, heads: Tensor) -> Tensor:
    """The output projection (N, T, E) of heads (N, H, T, D)."""
    out: Tensor = attention.out_proj(heads.transpose(1, 2).flatten(2))
    return out


def _rows(tensors: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    return tensors[0].index_select(0, index), tensors[1].index_select(0, index)
