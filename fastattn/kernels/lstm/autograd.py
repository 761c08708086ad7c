"""The derivatives of an LSTM layer and of a stack of them, for the operators and for eager calls that go around the
dispatcher.

A derivative of these derivatives is taken by the eager definition: see ``second_derivative``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels import definition, onlookers
from fastattn.kernels.lstm import extension, stack, torch_lstm
from fastattn.kernels.lstm.stack import Layer, Results

# "layer": (input, batch_sizes, h0, c0, weights) -> out, h_n, c_n. Plain PyTorch, differentiable to any order;
# ``fastattn.double_backward`` puts it here, because kernels import nothing that stands above them.
second_derivative: dict[str, Layer] = {}

_RESULTS = 3


# The operator ------------------------------------------------------------------------------------------------


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what ``vjp`` needs."""
    input, batch_sizes, h0, c0, weights, _, ctx.backend = inputs
    out, _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.weights = len(weights)
    ctx.save_for_backward(batch_sizes, input, h0, c0, *weights, out, *saved)


def vjp(ctx: Any, *grads: Any, stacked: bool = False) -> tuple[Any, ...]:
    """Gradients of the inputs of ``lstm_layer``, or of ``lstm_layers`` where ``stacked``."""
    batch_sizes, input, h0, c0, *rest = ctx.saved_tensors
    weights, (out, *saved) = rest[: ctx.weights], rest[ctx.weights :]
    wanted, tensors, needs = grads[:_RESULTS], (input, h0, c0, *weights), ctx.needs_input_grad
    many = needs[4] if isinstance(needs[4], Sequence) else (needs[4],) * len(weights)
    needed = (needs[0], needs[2], needs[3], *many)
    if definition.asked_for(*wanted):
        dinput, dh0, dc0, *dweights = _by_definition(tensors, needed, batch_sizes, _layers(h0, stacked), wanted)
        return dinput, None, dh0, dc0, dweights, None, None
    forward, backward = _operators(stacked)
    if saved[0].shape[0] == 0 and ctx.backend != "torch":
        out, _, _, *saved = forward(input, batch_sizes, h0, c0, weights, True, ctx.backend)
    if stacked:
        dinput, dh0, dc0, *dweights = _through_stack(
            partial(backward, backend=ctx.backend), tensors, needed, batch_sizes, (out, *saved), wanted
        )
    else:
        dinput, dh0, dc0, dweights = backward(*wanted, input, batch_sizes, h0, c0, weights, out, *saved, ctx.backend)
    return dinput, None, dh0, dc0, dweights, None, None


# Eager calls -------------------------------------------------------------------------------------------------


class _Extension(torch.autograd.Function):
    """A layer of the extension, or a stack of them."""

    @staticmethod
    def forward(ctx: Any, backend_and_stacked: tuple[str, bool], *inputs: Any) -> Results:
        ctx.backend, ctx.stacked = backend_and_stacked
        input, batch_sizes, h0, c0, *weights = inputs
        of_kind = extension.layers_forward if ctx.stacked else extension.forward
        out, h_n, c_n, *saved = of_kind[ctx.backend](input, batch_sizes, h0, c0, weights, True)
        ctx.weights = len(weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, input, h0, c0, *weights, out, *saved)
        return out, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        batch_sizes, input, h0, c0, *rest = ctx.saved_tensors
        needed, weights, saved = _needed(ctx.needs_input_grad), rest[: ctx.weights], rest[ctx.weights :]
        if extension_serves(grads):
            if ctx.stacked:
                dinput, dh0, dc0, *dweights = _through_stack(
                    extension.layers_backward[ctx.backend], (input, h0, c0, *weights), needed, batch_sizes, saved, grads
                )
            else:
                dinput, dh0, dc0, dweights = extension.backward[ctx.backend](
                    *grads, input, batch_sizes, h0, c0, weights, *saved, needed[0], any(needed[3:])
                )
        else:
            dinput, dh0, dc0, *dweights = past_extension(
                ctx.backend, (input, h0, c0, *weights), needed, batch_sizes, saved, grads, ctx.stacked
            )
        return None, dinput, None, dh0, dc0, *dweights


class _TorchLayers(torch.autograd.Function):
    """torch's own LSTM where cuDNN computes it, which has no second derivative: its graph stays inside this node."""

    @staticmethod
    def forward(ctx: Any, layers: int, *inputs: Any) -> Results:
        input, batch_sizes, h0, c0, *weights = inputs
        ctx.layers = layers
        ctx.graph = _graph(layers, batch_sizes, (input, h0, c0, *weights), _needed(ctx.needs_input_grad))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, input, h0, c0, *weights)
        out, h_n, c_n = (result.detach() for result in ctx.graph[1])
        return out, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        batch_sizes, *tensors = ctx.saved_tensors
        needed = _needed(ctx.needs_input_grad)
        found: Sequence[Tensor | None]
        if definition.asked_for(*grads):
            found = _by_definition(tensors, needed, batch_sizes, ctx.layers, grads)
        else:
            # The graph is gone after the first backward, as any other; for a second one it is built again.
            leaves, results = ctx.graph or _graph(ctx.layers, batch_sizes, tensors, needed)
            ctx.graph = None
            found = torch_lstm.gradients(leaves, results, grads)
        dinput, dh0, dc0, *dweights = found
        return None, dinput, None, dh0, dc0, *dweights


# (layers, input, batch_sizes, h0, c0, *weights), without dropout between the layers.
torch_layers: Callable[..., Results] = _TorchLayers.apply
_extension: Callable[..., Results] = _Extension.apply


def extension_layer(backend: str, *inputs: Any, stacked: bool = False) -> Results:
    """A layer of ``inputs`` (input, batch_sizes, h0, c0, *weights), backend "cpu" or "cuda"; or a stack, "cuda"."""
    return _extension((backend, stacked), *inputs)


def _graph(layers: int, batch_sizes: Tensor | None, tensors: Sequence[Tensor], needed: Sequence[bool]) -> Any:
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    with torch.enable_grad():
        return leaves, torch_lstm.run(leaves[0], batch_sizes, leaves[1], leaves[2], leaves[3:], layers)


def _needed(needs_input_grad: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of input, h0, c0 and the weights need a gradient, of a node of an eager call."""
    return needs_input_grad[1], *needs_input_grad[3:]


def extension_serves(grads: Sequence[Tensor | None]) -> bool:
    """Whether the extension itself may be called for these gradients: there is one, and nobody looks on."""
    given = [grad for grad in grads if grad is not None]
    return bool(given) and not definition.asked_for(*given) and not onlookers.present(*given)


def past_extension(
    backend: str, tensors: Sequence[Tensor], needed: Sequence[bool], batch_sizes: Tensor | None,
    saved: Sequence[Tensor], grads: Sequence[Tensor | None], stacked: bool = False,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Gradients of (input, h0, c0, *weights) by another way than a call of the extension.

    ``saved`` are the forward's out and what it kept; ``stacked`` says that it was a stack of layers, not one.
    """
    given = [grad for grad in grads if grad is not None]
    if not given:
        return [None] * len(tensors)
    if definition.asked_for(*given):
        return _by_definition(tensors, needed, batch_sizes, _layers(tensors[1], stacked), grads)
    input, h0, c0, *weights = tensors
    *found, dweights = _operators(stacked)[1](*grads, input, batch_sizes, h0, c0, weights, *saved, backend)
    return [*found, *dweights]


def _through_stack(
    backward: Callable[..., Any], tensors: Sequence[Tensor], needed: Sequence[bool], batch_sizes: Tensor | None,
    saved: Sequence[Tensor], grads: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (input, h0, c0, *weights) of a stack, by ``backward`` of the extension or of the operator.

    Layers below the first one that needs a gradient are left out, and the outputs of the last of them are the input.
    """
    input, h0, c0, *weights = tensors
    out, gates, cells, states = saved
    per_layer = len(weights) // h0.shape[0]
    first = 0 if any(needed[:3]) else list(needed[3:]).index(True) // per_layer
    if first > 0:
        input = states[first - 1].view(*input.shape[:-1], h0.shape[2])
        h0, c0, gates, cells, states = (tensor[first:] for tensor in (h0, c0, gates, cells, states))
        grad_out, *of_states = grads
        grads = (grad_out, *(None if grad is None else grad[first:] for grad in of_states))
    dinput, dh0, dc0, dweights = backward(
        *grads, input, batch_sizes, h0, c0, weights[first * per_layer :], out, gates, cells, states
    )
    found = [dinput, dh0, dc0] if first == 0 else [None] * (3 + first * per_layer)
    return [*found, *dweights]


def _operators(stacked: bool) -> tuple[Any, Any]:
    """Forward and backward of one layer, or of a stack."""
    ops = torch.ops.fastattn
    return (ops.lstm_layers, ops.lstm_layers_backward) if stacked else (ops.lstm_layer, ops.lstm_layer_backward)


def _layers(h0: Tensor, stacked: bool) -> int:
    return h0.shape[0] if stacked else 1


def _by_definition(
    tensors: Sequence[Tensor], needed: Sequence[bool], batch_sizes: Tensor | None, layers: int, grads: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients of (input, h0, c0, *weights) by the definition."""
    places = [place for place, need in enumerate(needed) if need]
    one = second_derivative["layer"]
    return definition.gradients(
        lambda input, h0, c0, *weights: stack.in_turn(one, layers, input, batch_sizes, h0, c0, weights),
        tensors, places, grads,
    )  # fmt: skip
