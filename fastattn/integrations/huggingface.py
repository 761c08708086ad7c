"""Hugging Face transformers: our attention and its mask function under one name, and which models may use it.

transformers asks a model's configuration for the name of its attention and looks it up in two registries. The
mask function of that name decides what the attention function gets; without one every mask would be dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional import scaled_dot_product_attention

NAME = "fastattn"
# Architectures whose outputs and gradients are tested against "eager", with the classes of their attention layers.
VERIFIED = {"bert": ("BertSelfAttention", "BertCrossAttention")}

_PREVIOUS = "_fastattn_previous_attention"
# Passed through by the models, without meaning for the attention itself.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position", "encoder_hidden_states", "output_hidden_states", "output_router_logits", "position_ids",
        "use_cache",
    }
)  # fmt: skip


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` available to transformers' models: the attention and its mask function.

    Calling it again changes nothing. ``fastattn.patch`` does it by itself.

    Raises ImportError when transformers is not installed, ValueError for a name that transformers gives a meaning.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(name, str) or not name:
        raise ValueError(f"name: got {name!r}, expected a non-empty string")
    if ALL_ATTENTION_FUNCTIONS.get(name, attention) is not attention:
        raise ValueError(f"name: {name!r} is already another attention of transformers; choose a free name")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


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
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function.

    Args:
        module: the attention layer; its ``config`` names the architecture, its ``is_causal`` is the default.
        query: (B, H, L, D), floating. key, value: (B, Hkv, S, D).
        attention_mask: what ``mask`` returned, or a mask of the caller's own: (B, S) padding, or (B, 1 or H, L, S);
            boolean, True takes part, or floating, added to the scores. None: causal where ``is_causal`` says so.
        dropout, scaling: as ``dropout_p`` and ``scale`` of ``fastattn.scaled_dot_product_attention``.
        output_attentions: also return the weights (B, H, L, S).

    Returns the output (B, L, H, D) and the weights or None.

    Raises NotImplementedError for an architecture that is not verified, or an argument we cannot honour; ValueError
    for a mask of another rank.
    """
    _check_architecture(getattr(module, "config", None))
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _WITHOUT_EFFECT)
    if unknown:
        raise NotImplementedError(
            f"{', '.join(unknown)}: passed by {type(module).__name__}, not honoured by attention {NAME!r} yet; "
            'use attn_implementation="eager" for this model'
        )
    if attention_mask is not None and attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected (B, S) or (B, 1 or H, L, S)"
        )
    padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    dense = attention_mask if padding is None else None
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    if output_attentions is None:
        output_attentions = bool(getattr(getattr(module, "config", None), "output_attentions", False))
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        dense,
        dropout_p=dropout,
        # A mask already contains the triangle. A single query is the newest token and sees every key.
        is_causal=is_causal and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        key_padding_mask=padding,
        need_weights=output_attentions,
        average_weights=False,
    )
    out, weights = result if output_attentions else (result, None)
    return out.transpose(1, 2), weights


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: padding of an encoder stays (B, S), anything else is transformers' dense mask.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: B, L, S and the positions of the first query and key;
            q_offset may be a tensor.
        attention_mask: (B, at least S) boolean, True is a token, or None.
        allow_is_bidirectional_skip: the caller takes None, or a structure, for a mask that depends on padding alone.
        use_vmap: the pattern is the caller's own function.
        kwargs: ``mask_function``, the pattern over (batch, head, query, key) positions, ``config`` and more.

    Returns (B, S) boolean, (B, 1, L, S) boolean, or None where everything (or, for a causal layer, the plain
    triangle) takes part.

    Raises NotImplementedError for an architecture that is not verified, ValueError for a mask of another rank.
    """
    from transformers import masking_utils

    _check_architecture(kwargs.get("config"))
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, expected (B, S) or four dimensions")
    pattern = kwargs.get("mask_function", masking_utils.causal_mask_function)
    plain = pattern is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip and not use_vmap
    if not plain:
        dense: Tensor | None = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            **kwargs,
        )
        return dense
    if attention_mask is None:
        return None
    padding: Any = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    # Looking at the values is free on the CPU and opens the backends for unpadded input; elsewhere it would stop
    # the host at every forward, or break the graph.
    if padding.device.type == "cpu" and not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    structure: Tensor = padding
    return structure


def patch_models(root: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Switch every verified transformers model inside ``root``; returns the attention layers and what was left alone.

    The switch is an entry of the configuration, so models that share one configuration object switch together, as
    with transformers' own ``set_attn_implementation``.
    """
    from transformers import PreTrainedModel

    skipped: dict[str, str] = {}
    found = _verified_modules(root)
    switched: set[int] = set()
    for _, module in found:  # all of them before the first switch: one switch may reach several configurations
        if module.config._attn_implementation != NAME and id(module.config) not in switched:
            switched.add(id(module.config))
            setattr(module, _PREVIOUS, module.config._attn_implementation)
    if switched:
        register()
    for name, module in found:
        if isinstance(module, PreTrainedModel):
            if id(module.config) not in switched:
                skipped[name] = f'already uses attention "{NAME}"'
            module.set_attn_implementation(NAME)
        # A composite gives its parts new configurations, of which the layers inside know nothing.
        module.config._attn_implementation = NAME
    replaced = [name for name, module in found if _is_layer(module) and id(module.config) in switched]
    covered = {id(module.config) for _, module in found}
    for name, module in root.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in covered:
            covered.add(id(module.config))
            skipped[name] = f"{type(module).__name__}: architecture {module.config.model_type!r} not verified yet"
    return replaced, skipped


def unpatch_models(root: nn.Module) -> list[str]:
    """Give every model inside ``root`` the attention it had before ``patch_models``; returns the attention layers."""
    restored: set[int] = set()
    found = _verified_modules(root)
    for _, module in found:
        if _PREVIOUS in module.__dict__:
            module.config._attn_implementation = module.__dict__.pop(_PREVIOUS)
            restored.add(id(module.config))
    return [name for name, module in found if _is_layer(module) and id(module.config) in restored]


def _verified_modules(root: nn.Module) -> list[tuple[str, Any]]:
    """Modules of verified architectures that look up the attention in a configuration, the outer before the inner."""
    homes = {f"transformers.models.{architecture}.modeling_{architecture}" for architecture in VERIFIED}
    return [
        (name, module)
        for name, module in root.named_modules()
        if type(module).__module__ in homes and hasattr(module, "config")
    ]


def _is_layer(module: nn.Module) -> bool:
    return any(type(module).__name__ in layers for layers in VERIFIED.values())


def _check_architecture(config: Any) -> None:
    """Other architectures pass other arguments, or use the mask in ways of their own: refuse rather than err."""
    architecture = getattr(config, "model_type", None)
    if architecture not in VERIFIED:
        raise NotImplementedError(
            f"attention {NAME!r}: architecture {architecture!r} is not verified yet, verified are "
            f"{', '.join(map(repr, VERIFIED))}; use another attn_implementation"
        )
