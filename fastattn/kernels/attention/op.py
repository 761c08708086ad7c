"""The attention operators: schema, shape rule, autograd and autocast; each backend's code is called from here.

| operator (torch.ops.fastattn)  | returns                                                  |
|--------------------------------|----------------------------------------------------------|
| attention                      | out, logsumexp                                           |
| attention_backward             | gradients of query, key, value, attn_mask, padding mask  |
| attention_weights              | weights from the logsumexp: head average or per head     |
| attention_weights_backward     | gradients of query, key, logsumexp and both masks        |
| attention_with_weights         | out, logsumexp, weights in one pass (backend "cpu")      |

The logsumexp (2, B, H, L) is the float32 number and what its rounding lost (see ``shapes``). It is an input of the
weights; ``autograd`` says how its gradient flows.

Arguments shared by all, checked by ``fastattn.functional`` before they come here:

query (B, H, L, D), key and value (B, Hkv, S, D), H a multiple of Hkv; sinks (H) floating, part of the logsumexp only;
attn_mask broadcastable to (B, H, L, S), four dimensions, boolean (True takes part) or floating (added);
key_padding_mask (B, S), boolean or floating; alibi_slopes (B or 1, H) float32; segment_query (B, L) and segment_key
(B, S) integers of one dtype, both or none; seed int64 (1,), read only where dropout_p > 0; softcap 0 for none; shift,
the position of query 0 among the keys, for alibi_slopes; entry (i, j) takes part where lower <= j - i <= upper, None
leaves a side open; backend "triton" or "cpu". What each means: ``fastattn.reference.attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.attention import autograd, extension, launch, shapes

_PROBLEM = (
    "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? alibi_slopes, Tensor? segment_query, Tensor? segment_key, "
    "Tensor? seed, float dropout_p, float scale, float softcap, SymInt shift, SymInt? lower, SymInt? upper"
)
_SCHEMAS = {
    "attention": (
        f"(Tensor query, Tensor key, Tensor value, Tensor? sinks, {_PROBLEM}, str backend) -> (Tensor, Tensor)"
    ),
    "attention_backward": (
        "(Tensor? grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, "
        f"Tensor logsumexp, {_PROBLEM}, bool attn_mask_grad, bool padding_grad, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor[])"
    ),
    "attention_weights": (
        f"(Tensor query, Tensor key, Tensor logsumexp, {_PROBLEM}, bool average, str backend) -> Tensor"
    ),
    "attention_weights_backward": (
        f"(Tensor grad_weights, Tensor query, Tensor key, Tensor logsumexp, {_PROBLEM}, bool average, "
        "bool attn_mask_grad, bool padding_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor[])"
    ),
    "attention_with_weights": (
        f"(Tensor query, Tensor key, Tensor value, Tensor? sinks, {_PROBLEM}, bool average, str backend) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
_BACKENDS: dict[str, Any] = {"triton": launch, "cpu": extension}

_library = torch.library.Library("fastattn", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _implementation(name: str) -> Any:
    def call(*args: Any) -> Any:
        *arguments, backend = args
        return getattr(_BACKENDS[backend], name)(*arguments)

    call.__name__ = name
    return call


for _name in _SCHEMAS:
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation(_name), _key)


# Shape rules -------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::attention", lib=_library)
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return shapes.empty_output(query, value), shapes.empty_logsumexp(query)


@torch.library.register_fake("fastattn::attention_backward", lib=_library)
def _attention_backward_fake(
    grad_out: Tensor | None, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    logsumexp: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return (
        shapes.empty_like_heads_last(query), shapes.empty_like_heads_last(key), shapes.empty_like_heads_last(value),
        shapes.empty_mask_grads((attn_mask, key_padding_mask), rest[-3:-1]),
    )  # fmt: skip


@torch.library.register_fake("fastattn::attention_weights", lib=_library)
def _attention_weights_fake(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> Tensor:
    return shapes.empty_weights(query, key, average=rest[-2])


@torch.library.register_fake("fastattn::attention_weights_backward", lib=_library)
def _attention_weights_backward_fake(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, attn_mask: Tensor | None,
    key_padding_mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return (
        shapes.empty_like_heads_last(query), shapes.empty_like_heads_last(key), shapes.empty_logsumexp(query),
        shapes.empty_mask_grads((attn_mask, key_padding_mask), rest[-3:-1]),
    )  # fmt: skip


@torch.library.register_fake("fastattn::attention_with_weights", lib=_library)
def _attention_with_weights_fake(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weights = shapes.empty_weights(query, key, average=rest[-2])
    return shapes.empty_output(query, value), shapes.empty_logsumexp(query), weights


# Autograd ----------------------------------------------------------------------------------------------------

for _name, _setup, _vjp in (
    ("attention", autograd.setup_attention, autograd.attention_vjp),
    ("attention_weights", autograd.setup_weights, autograd.weights_vjp),
    ("attention_with_weights", autograd.setup_attention, autograd.attention_with_weights_vjp),
):
    torch.library.register_autograd(f"fastattn::{_name}", _vjp, setup_context=_setup, lib=_library)


# Autocast ----------------------------------------------------------------------------------------------------


def _autocast(name: str, tensors: int, device_type: str, key: Any) -> Any:
    """Cast the first ``tensors`` arguments to the autocast dtype; masks and logsumexp keep their own dtype."""
    overload = getattr(torch.ops.fastattn, name).default
    guard = torch._C.DispatchKeySet(key)

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(guard):
            cast = [
                arg.to(dtype) if arg.is_floating_point() and arg.dtype != torch.float64 else arg
                for arg in args[:tensors]
            ]
            return overload(*cast, *args[tensors:])

    return call


for _name, _tensors in (("attention", 3), ("attention_weights", 2), ("attention_with_weights", 3)):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(_name, _autocast(_name, _tensors, _device, getattr(torch._C.DispatchKey, _key)), _key)
