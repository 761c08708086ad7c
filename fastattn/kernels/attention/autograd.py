"""The derivatives of the attention operators.

The logsumexp (2, B, H, L) is an output of the attention and an input of the weights, so a gradient of the weights flows
through it into ``attention_backward``; it counts in its first part only:

    dS_ij = P_ij (dP_ij - delta_i + dLSE_i),   delta_i = sum_j P_ij dP_ij = <dO_i, O_i>       (attention)
    dS_ij = W_ij dW_ij,                        dLSE_i = -sum_j dS_ij                           (weights)
    dsink = sum_i exp(sink - LSE_i) (dLSE_i - delta_i)                                         (attention)

A derivative of these derivatives is taken by the eager definition: see ``second_derivative``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels import definition

# What _PROBLEM of ``op`` lists: its arguments, and the tensors among them, which come first.
PROBLEM_ARGS, PROBLEM_TENSORS = 12, 6

Results = tuple[Tensor, ...]
# "attention": (query, key, value, sinks, *problem, average) -> out, logsumexp, weights;
# "weights": (query, key, logsumexp, *problem, average) -> (weights,). Plain PyTorch, differentiable to any order;
# ``fastattn.double_backward`` puts them here, because kernels import nothing that stands above them.
second_derivative: dict[str, Callable[..., Any]] = {}


def setup_attention(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """Of ``attention`` and ``attention_with_weights``."""
    query, key, value, sinks, *problem = inputs
    ctx.rest = problem[PROBLEM_ARGS:]
    _save(ctx, (query, key, value, sinks, output[0], output[1]), problem, first=4)


def setup_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of ``attention_weights``."""
    query, key, logsumexp, *problem = inputs
    ctx.rest = problem[PROBLEM_ARGS:]
    _save(ctx, (query, key, logsumexp), problem, first=3)


def _save(ctx: Any, tensors: tuple[Tensor | None, ...], problem: list[Any], first: int) -> None:
    """Keep what a backward needs. ``first`` is the position of attn_mask among the operator's inputs."""
    ctx.numbers = problem[PROBLEM_TENSORS:PROBLEM_ARGS]
    ctx.save_for_backward(*tensors, *problem[:PROBLEM_TENSORS])
    ctx.mask_grads = (ctx.needs_input_grad[first], ctx.needs_input_grad[first + 1])
    ctx.set_materialize_grads(False)


def _mask_results(ctx: Any, grads: list[Tensor]) -> list[Tensor | None]:
    remaining = iter(grads)
    return [next(remaining) if wanted else None for wanted in ctx.mask_grads]


def attention_vjp(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the inputs of ``attention``."""
    if definition.asked_for(grad_out, grad_logsumexp):
        return _eager_vjp(ctx, "attention", 4, (grad_out, grad_logsumexp, None))
    return (*_attention_grads(ctx, grad_out, grad_logsumexp), *(None,) * (PROBLEM_ARGS - 2 + len(ctx.rest)))


def attention_with_weights_vjp(
    ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None, grad_weights: Tensor | None
) -> tuple[Any, ...]:
    """The weights as a function of the logsumexp, then the attention with the logsumexp gradient they add."""
    if definition.asked_for(grad_out, grad_logsumexp, grad_weights):
        return _eager_vjp(ctx, "attention", 4, (grad_out, grad_logsumexp, grad_weights))
    query, key, _, _, _, logsumexp, *problem = ctx.saved_tensors
    extra: list[Any] = [None] * 3
    dmasks: list[Tensor | None] = [None, None]
    if grad_weights is not None:
        *extra, grads = torch.ops.fastattn.attention_weights_backward(
            grad_weights, query, key, logsumexp, *problem, *ctx.numbers, ctx.rest[0], *ctx.mask_grads, ctx.rest[1]
        )
        dmasks = _mask_results(ctx, grads)
        grad_logsumexp = extra[2] if grad_logsumexp is None else grad_logsumexp + extra[2]
    results = _attention_grads(ctx, grad_out, grad_logsumexp)
    for place, more in ((0, extra[0]), (1, extra[1]), (4, dmasks[0]), (5, dmasks[1])):
        if results[place] is not None and more is not None:
            results[place] = results[place] + more
    return (*results, *(None,) * (PROBLEM_ARGS - 2 + len(ctx.rest)))


def _attention_grads(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> list[Any]:
    """Gradients of query, key, value, sinks, attn_mask and key_padding_mask."""
    query, key, value, sinks, out, logsumexp, *problem = ctx.saved_tensors
    if grad_out is None and grad_logsumexp is None:
        return [None] * 6
    dquery, dkey, dvalue, dmasks = torch.ops.fastattn.attention_backward(
        grad_out, grad_logsumexp, query, key, value, out, logsumexp, *problem, *ctx.numbers, *ctx.mask_grads,
        ctx.rest[-1],
    )  # fmt: skip
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        dsinks = _sink_grad(sinks, out, logsumexp, grad_out, grad_logsumexp)
    return [dquery, dkey, dvalue, dsinks, *_mask_results(ctx, dmasks)]


def _sink_grad(
    sinks: Tensor, out: Tensor, logsumexp: Tensor, grad_out: Tensor | None, grad_logsumexp: Tensor | None
) -> Tensor:
    """dsink (H): a sink is a key whose value is 0. Sums of one number per row: torch's own operators."""
    share = torch.exp((sinks.float()[:, None] - logsumexp[0]) - logsumexp[1])
    term = torch.zeros_like(share)
    if grad_out is not None:
        term = term - (grad_out.float() * out.float()).sum(-1)
    if grad_logsumexp is not None:
        term = term + grad_logsumexp[0]
    return (share * term).sum((0, 2)).to(sinks.dtype)


def weights_vjp(ctx: Any, grad_weights: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the inputs of ``attention_weights``."""
    if definition.asked_for(grad_weights):
        return _eager_vjp(ctx, "weights", 3, (grad_weights,))
    if grad_weights is None:
        return (None,) * (3 + PROBLEM_ARGS + 2)
    query, key, logsumexp, *problem = ctx.saved_tensors
    dquery, dkey, dlogsumexp, dmasks = torch.ops.fastattn.attention_weights_backward(
        grad_weights, query, key, logsumexp, *problem, *ctx.numbers, ctx.rest[0], *ctx.mask_grads, ctx.rest[1]
    )
    return (dquery, dkey, dlogsumexp, *_mask_results(ctx, dmasks), *(None,) * (PROBLEM_ARGS - 2 + len(ctx.rest)))


def _eager_vjp(ctx: Any, name: str, tensors: int, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The same gradients by the definition, which holds the (B, H, L, S) scores."""
    saved = ctx.saved_tensors
    inputs = (*saved[:tensors], *saved[-PROBLEM_TENSORS:])
    average = ctx.rest[0] if len(ctx.rest) == 2 else True
    wanted = [place for place, need in enumerate(ctx.needs_input_grad[: len(inputs)]) if need]
    found = definition.gradients(
        lambda *given: second_derivative[name](*given, *ctx.numbers, average), inputs, wanted, grads
    )
    return (*found, *(None,) * (PROBLEM_ARGS - PROBLEM_TENSORS + len(ctx.rest)))
