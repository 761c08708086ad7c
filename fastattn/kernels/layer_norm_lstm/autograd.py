"""The derivatives of the layer-normalised LSTM's operator; those of a derivative come from the eager definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.definition import asked_for, gradients

# Arguments that the operators share (_PROBLEM of ``op``), and what comes after the weights among them.
PROBLEM_ARGS, AFTER_WEIGHTS = 11, 6

# "layer": the arguments that the operators share -> out, cells, h_n, c_n. Plain PyTorch, differentiable to any order;
# ``fastattn.layer_norm_lstm`` puts it here, because kernels import nothing that stands above them.
definition: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {}


def setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, h0, c0, weights, h_mask, zoneout_h, zoneout_c, *ctx.numbers = inputs[:PROBLEM_ARGS]
    ctx.save, _, ctx.backend = inputs[PROBLEM_ARGS:]
    out, *_, saved = output
    ctx.save_for_backward(input, batch_sizes, h0, c0, h_mask, zoneout_h, zoneout_c, out, saved, *weights)
    ctx.set_materialize_grads(False)


def layer_vjp(
    ctx: Any,
    grad_out: Tensor | None,
    grad_cells: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    _: Tensor | None,
) -> tuple[Any, ...]:
    """Gradients of the inputs of ``layer_norm_lstm_layer``."""
    input, batch_sizes, h0, c0, h_mask, zoneout_h, zoneout_c, out, saved, *weights = ctx.saved_tensors
    problem = (input, batch_sizes, h0, c0, weights, h_mask, zoneout_h, zoneout_c, *ctx.numbers)
    grads = (grad_out, grad_cells, grad_h_n, grad_c_n)
    rest = (None,) * (AFTER_WEIGHTS + 3)
    if all(grad is None for grad in grads):
        return (None, None, None, None, [None] * len(weights), *rest)
    if asked_for(*grads) or not ctx.save:
        found = derivatives(problem, (input, h0, c0, *weights), grads)
        return (found[0], None, found[1], found[2], found[3:], *rest)
    wanted = ctx.needs_input_grad[0]
    dinput, dh0, dc0, dweights = torch.ops.fastattn.layer_norm_lstm_layer_backward(
        *grads, out, saved, *problem, wanted, ctx.backend
    )
    return (dinput if wanted else None, None, dh0, dc0, dweights, *rest)


def derivatives(
    problem: Sequence[Any], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``tensors``, which stand for input, h0, c0 and the weights of ``problem``, by the definition."""
    _, batch_sizes, _, _, _, *masks = problem

    def layer(input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return definition["layer"](input, batch_sizes, h0, c0, weights, *masks)

    return gradients(layer, tensors, range(len(tensors)), grads)
