"""transformers' attention function: its arguments, as arguments of ``fastattn.scaled_dot_product_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional import scaled_dot_product_attention
from fastattn.integrations.huggingface import architectures
from fastattn.integrations.huggingface.structure import StructuredMask

# Passed through by the models, without meaning for the attention itself. ``deterministic`` asks for gradients that
# are the same bits at every run: ours are.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position", "deterministic", "encoder_hidden_states", "num_items_in_batch", "output_hidden_states",
        "output_router_logits", "position_ids", "return_dict", "use_cache",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Mask:
    """A mask taken apart: query i sees keys from i + shift - left to i + shift + right (None: no bound)."""

    dense: Tensor | None = None  # (B or 1, H or 1, L, S), boolean or floating
    padding: Tensor | None = None  # (B, S)
    left: int | None = None
    right: int | None = None
    shift: int = 0


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function.

    Args:
        module: the attention layer; its ``config`` names the architecture, its ``is_causal`` is the default.
        query: (B, H, L, D), floating. key, value: (B, Hkv, S, D); Hkv = H or a divisor of it.
        attention_mask: what ``mask`` returned, or a mask of the caller's own. In four dimensions, (B, 1 or H, L, S),
            it says everything: boolean, True takes part, or floating, added to the scores. None, and (B, S) for
            padding, leave the rest to ``is_causal`` and ``sliding_window``, the newest query beside the newest key.
        dropout, scaling, softcap: as ``dropout_p``, ``scale``, ``softcap`` of ``scaled_dot_product_attention``.
        output_attentions: also return the weights (B, H, L, S).
        sliding_window: keys at this distance before the query, or further, are masked; after it too in a layer that
            is not causal. Ignored beside a mask in four dimensions, which has the window in it.
        s_aux: (H), the sinks of gpt-oss.
        position_bias: (1 or B, H, L, S), added to the scores, differentiable (T5).

    Returns the output (B, L, H, D) and the weights or None.

    Raises NotImplementedError for an architecture that is not verified, or an argument we cannot honour; ValueError
    for a mask of another rank or size.
    """
    config = getattr(module, "config", None)
    architectures.check(config)
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _WITHOUT_EFFECT)
    if unknown:
        raise NotImplementedError(
            f"{', '.join(unknown)}: passed by {type(module).__name__}, not honoured by attention "
            f'{architectures.NAME!r}; use attn_implementation="eager" for this model'
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    if output_attentions is None:
        output_attentions = _collected() or bool(getattr(config, "output_attentions", False))
    queries, keys = query.shape[2], key.shape[2]
    mask = _take_apart(attention_mask, query, keys, is_causal, sliding_window)
    # Beyond the newest query's own position a static cache holds nothing yet. A slice is a view: nothing is copied.
    visible = keys if mask.right != 0 or queries + mask.shift >= keys else queries + mask.shift
    padding, dense = mask.padding, _added(position_bias, mask.dense)
    if visible < keys:
        key, value = key[:, :, :visible], value[:, :, :visible]
        padding = None if padding is None else padding[:, :visible]
        dense = dense if dense is None or dense.shape[3] == 1 else dense[..., :visible]
    causal, window, alignment = _band(mask, queries, visible)
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        dense,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=bool(key.shape[1] != query.shape[1]),
        key_padding_mask=padding,
        window=window,
        softcap=softcap,
        sinks=s_aux,
        causal_alignment=alignment,
        need_weights=output_attentions,
        average_weights=False,
    )
    out, weights = result if output_attentions else (result, None)
    if weights is not None and visible < keys:
        weights = nn.functional.pad(weights, (0, keys - visible))
    return out.transpose(1, 2), weights


def _collected() -> bool:
    """Whether the model collects weights from its layers; not each model that is asked to tells its layers (GPT-2).

    Unknown to a layer that is compiled alone: the graph cannot look outside itself.
    """
    from transformers.utils import output_capturing

    collector: Any = getattr(output_capturing, "_active_collector", None)
    if collector is None or (torch.compiler.is_compiling() and not collector.compiling):
        return False
    outputs = collector.get()
    return outputs is not None and any(name.endswith("attentions") for name in outputs)


def _take_apart(mask: Tensor | None, query: Tensor, keys: int, is_causal: bool, sliding_window: int | None) -> _Mask:
    if isinstance(mask, StructuredMask):
        if tuple(mask.shape[2:]) != (query.shape[2], keys):
            raise ValueError(
                f"attention_mask: made for {tuple(mask.shape[2:])} queries and keys, got {(query.shape[2], keys)}"
            )
        return _Mask(None, mask.padding, mask.left, mask.right, mask.shift)
    if mask is None or mask.dim() == 2:
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window: got {sliding_window}, expected a positive number or None")
        left = None if sliding_window is None else sliding_window - 1
        return _Mask(None, mask, left, 0 if is_causal else left, keys - query.shape[2])
    if mask.dim() != 4:
        raise ValueError(f"attention_mask: got shape {tuple(mask.shape)}, expected (B, S) or (B, 1 or H, L, S)")
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] == keys:
        return _Mask(padding=mask[:, 0, 0].expand(query.shape[0], keys))  # the same for every query: padding
    return _Mask(dense=mask)


def _added(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """A bias on the scores and a dense mask, as one mask; the bias keeps its gradient."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def _band(mask: _Mask, queries: int, keys: int) -> tuple[bool, tuple[int | None, int | None] | None, str]:
    """is_causal, window and causal_alignment of the public function; bounds that mask nothing are left out."""
    left, right, shift = mask.left, mask.right, mask.shift
    if left is not None and queries - 1 + shift - left <= 0:
        left = None
    if right is not None and shift + right >= keys - 1:
        right = None
    window = None if left is None and (right is None or right == 0) else (left, None if right == 0 else right)
    return right == 0, window, "top-left" if shift == 0 else "bottom-right"
