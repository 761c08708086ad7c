"""Switching the models inside a module to our attention, and back."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastattn.integrations.huggingface.architectures import NAME, VERIFIED, home, why_not
from fastattn.integrations.huggingface.registration import register

_PREVIOUS = "_fastattn_previous_attention"


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
            skipped[name] = f"{type(module).__name__}: {why_not(module.config.model_type)}"
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
    homes = {home(architecture) for architecture in VERIFIED}
    return [
        (name, module)
        for name, module in root.named_modules()
        if type(module).__module__ in homes and hasattr(module, "config")
    ]


def _is_layer(module: nn.Module) -> bool:
    return any(type(module).__name__ in layers for layers in VERIFIED.values())
