"""The attention operators: schema, shape rule, autograd and autocast; each backend's code is called from here.

| operator (torch.ops.fastattn)  | returns                                                  |
|--------------------------------|----------------------------------------------------------|
| attention                      | out, logsumexp                                           |
| attention_backward             | gradients of query, key, value, attn_mask, padding mask  |
| attention_weights              | weights from the logsumexp: head average or per head     |
| attention_weights_backward     | gradients of query, key, logsumexp and both masks        |
| attention_with_weights         | out, logsumexp, weights in one pass (backend "cpu")      |

The logsumexp (2, B, H, L) is the float32 number and what its rounding lost (see ``shapes``); its gradient counts in the
first only. It is an input of the weights, so a weights gradient flows through it into ``attention_backward``:

    dS_ij = P_ij (dP_ij - delta_i + dLSE_i),   delta_i = sum_j P_ij dP_ij = <dO_i, O_i>       (attention)
    dS_ij = W_ij dW_ij,                        dLSE_i = -sum_j dS_ij                           (weights)

Arguments shared by all, checked by ``fastattn.functional`` before they come here:

query (B, H, L, D), key and value (B, Hkv, S, D), H a multiple of Hkv; attn_mask broadcastable to (B, H, L, S), four
dimensions, boolean (True takes part) or floating (added); key_padding_mask (B, S), boolean or floating; seed int64
(1,), read only where dropout_p > 0; entry (i, j) takes part where lower <= j - i <= upper, None leaves a side open;
backend "triton" or "cpu".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.attention import extension, launch, shapes

_PROBLEM = (
    "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? seed, float dropout_p, float scale, "
    "SymInt? lower, SymInt? upper"
)
_SCHEMAS = {
    "attention": f"(Tensor query, Tensor key, Tensor value, {_PROBLEM}, str backend) -> (Tensor, Tensor)",
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
        f"(Tensor query, Tensor key, Tensor value, {_PROBLEM}, bool average, str backend) -> (Tensor, Tensor, Tensor)"
    ),
}
_PROBLEM_ARGS = 7
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


def _save_problem(ctx: Any, tensors: tuple[Tensor, ...], problem: tuple[Any, ...], first: int) -> None:
    """Keep what a backward needs. ``first`` is the position of attn_mask among the operator's inputs."""
    attn_mask, key_padding_mask, seed, *ctx.numbers = problem
    ctx.save_for_backward(*tensors, attn_mask, key_padding_mask, seed)
    ctx.mask_grads = (ctx.needs_input_grad[first], ctx.needs_input_grad[first + 1])
    ctx.set_materialize_grads(False)


def _mask_results(ctx: Any, grads: list[Tensor]) -> list[Tensor | None]:
    remaining = iter(grads)
    return [next(remaining) if wanted else None for wanted in ctx.mask_grads]


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, *problem = inputs
    ctx.backend = problem[_PROBLEM_ARGS:]
    _save_problem(ctx, (query, key, value, output[0], output[1]), tuple(problem[:_PROBLEM_ARGS]), first=3)


def _attention_vjp(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    *tensors, attn_mask, key_padding_mask, seed = ctx.saved_tensors
    if grad_out is None and grad_logsumexp is None:
        return (None,) * (3 + _PROBLEM_ARGS + len(ctx.backend))
    dquery, dkey, dvalue, dmasks = torch.ops.fastattn.attention_backward(
        grad_out, grad_logsumexp, *tensors, attn_mask, key_padding_mask, seed, *ctx.numbers, *ctx.mask_grads,
        ctx.backend[-1],
    )  # fmt: skip
    return (
        dquery, dkey, dvalue, *_mask_results(ctx, dmasks), *(None,) * 5, *(None,) * len(ctx.backend)
    )  # fmt: skip


def _setup_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, logsumexp, *problem = inputs
    ctx.average, ctx.backend = problem[_PROBLEM_ARGS:]
    _save_problem(ctx, (query, key, logsumexp), tuple(problem[:_PROBLEM_ARGS]), first=3)


def _weights_vjp(ctx: Any, grad_weights: Tensor | None) -> tuple[Any, ...]:
    query, key, logsumexp, attn_mask, key_padding_mask, seed = ctx.saved_tensors
    if grad_weights is None:
        return (None,) * (3 + _PROBLEM_ARGS + 2)
    dquery, dkey, dlogsumexp, dmasks = torch.ops.fastattn.attention_weights_backward(
        grad_weights, query, key, logsumexp, attn_mask, key_padding_mask, seed, *ctx.numbers, ctx.average,
        *ctx.mask_grads, ctx.backend,
    )  # fmt: skip
    return (dquery, dkey, dlogsumexp, *_mask_results(ctx, dmasks), *(None,) * 7)


def _attention_with_weights_vjp(
    ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None, grad_weights: Tensor | None
) -> tuple[Any, ...]:
    """The weights as a function of the logsumexp, then the attention with the logsumexp gradient they add."""
    query, key, _, _, logsumexp, attn_mask, key_padding_mask, seed = ctx.saved_tensors
    average, backend = ctx.backend
    extra: list[Any] = [None] * 3
    dmasks: list[Tensor | None] = [None, None]
    if grad_weights is not None:
        *extra, grads = torch.ops.fastattn.attention_weights_backward(
            grad_weights, query, key, logsumexp, attn_mask, key_padding_mask, seed, *ctx.numbers, average,
            *ctx.mask_grads, backend,
        )  # fmt: skip
        dmasks = _mask_results(ctx, grads)
        grad_logsumexp = extra[2] if grad_logsumexp is None else grad_logsumexp + extra[2]
    results = list(_attention_vjp(ctx, grad_out, grad_logsumexp))
    for place, more in ((0, extra[0]), (1, extra[1]), (3, dmasks[0]), (4, dmasks[1])):
        if results[place] is not None and more is not None:
            results[place] = results[place] + more
    return tuple(results)


torch.library.register_autograd(
    "fastattn::attention", _attention_vjp, setup_context=_setup_attention, lib=_library
)
torch.library.register_autograd(
    "fastattn::attention_weights", _weights_vjp, setup_context=_setup_weights, lib=_library
)
torch.library.register_autograd(
    "fastattn::attention_with_weights", _attention_with_weights_vjp, setup_context=_setup_attention, lib=_library
)


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
