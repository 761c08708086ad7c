"""The attention weights of a whole model, as its containers throw them away."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastattn.modules.attention import MultiheadAttention

_SIGNATURE = inspect.signature(MultiheadAttention.forward)


@contextmanager
def attention_maps(model: nn.Module, average: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collect what every fastattn.MultiheadAttention inside ``model`` attends to, in training and in evaluation.

        with attention_maps(encoder) as maps:
            out = encoder(source)
        maps["layers.0.self_attn"]  # (B, L, S)

    Args:
        model: any module, such as an nn.TransformerEncoder that was patched.
        average: average over the heads, (B, L, S), or give each one's, (B, H, L, S).

    Yields:
        The weights by the attention module's name, those of its latest call, differentiable.

    Raises:
        ValueError: there is no fastattn.MultiheadAttention inside ``model``.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, MultiheadAttention)}
    if not modules:
        raise ValueError(f"model: got a {type(model).__name__} without a fastattn.MultiheadAttention; patch it first")
    maps: dict[str, Tensor] = {}
    handles: list[Any] = []
    wanted = {module: module.need_weights for module in modules.values()}

    def ask(module: MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call = _SIGNATURE.bind(module, *args, **kwargs)
        call.arguments.update(need_weights=True, average_attn_weights=average)
        return call.args[1:], call.kwargs

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
            maps[name] = output[1]

        return hook

    try:
        for name, module in modules.items():
            module.need_weights = None
            handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(module.register_forward_hook(keep(name)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()
        for module, before in wanted.items():
            module.need_weights = before
