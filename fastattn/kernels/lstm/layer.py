"""One call of one LSTM layer by the shortest way: the operator for a compiler, the extension itself for an eager call.

A loop over ``LSTMCell`` makes one call a step, and the dispatcher would cost as much as the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels import onlookers
from fastattn.kernels.lstm import (
    autograd,
    extension,
    op,  # noqa: F401  op registers torch.ops.fastattn
    stack,
    steps,
    torch_lstm,
)


def lstm_layer(
    backend: str, input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """out, h_n and c_n of one layer by the extension, ``backend`` "cpu" or "cuda"; arguments as in ``op``."""
    grad = _needs_grad(input, h0, c0, weights)
    if onlookers.present(input, h0, c0, *weights):
        out, h_n, c_n, _, _ = torch.ops.fastattn.lstm_layer(input, batch_sizes, h0, c0, weights, grad, backend)
    elif grad and backend == "cpu" and steps.serve(input, batch_sizes, h0, c0, weights):
        out, h_n, c_n = steps.step(input, h0, c0, weights)
    elif grad:
        out, h_n, c_n = autograd.extension_layer(backend, input, batch_sizes, h0, c0, *weights)
    else:
        out, h_n, c_n, _, _ = extension.forward[backend](input, batch_sizes, h0, c0, weights, False)
    return out, h_n, c_n


def lstm_layers(
    backend: str, input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Likewise of a stack of layers in one direction without projections or dropout, by the extension's "cuda"."""
    grad = _needs_grad(input, h0, c0, weights)
    if onlookers.present(input, h0, c0, *weights):
        out, h_n, c_n, *_ = torch.ops.fastattn.lstm_layers(input, batch_sizes, h0, c0, weights, grad, backend)
    elif grad:
        out, h_n, c_n = autograd.extension_layer(backend, input, batch_sizes, h0, c0, *weights, stacked=True)
    else:
        out, h_n, c_n, *_ = extension.layers_forward[backend](input, batch_sizes, h0, c0, weights, False)
    return out, h_n, c_n


def lstm_cell(input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """h_1 and c_1 (B, H) of one step on input (B, I) by the extension on the CPU, from h0 and c0 (B, H).

    None where only ``lstm_layer`` takes the call.
    """
    if onlookers.present(input, h0, c0, *weights):
        return None
    if not _needs_grad(input, h0, c0, weights):
        h_1, c_1, _, _ = extension.cell_forward(input, h0, c0, weights, False)
    elif steps.serve_cell(weights):
        h_1, c_1 = steps.step(input, h0, c0, weights)
    else:
        return None
    return h_1, c_1


def torch_layers(
    layers: int, input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """out, h_n and c_n of ``layers`` layers without dropout by torch's own LSTM."""
    # The operator is one layer of one device's kernels; torch's function takes whatever else there is.
    if torch.compiler.is_compiling() and input.device.type in ("cpu", "cuda"):
        return stack.in_turn(_traced_layer, layers, input, batch_sizes, h0, c0, weights)
    if input.is_cuda and _needs_grad(input, h0, c0, weights) and not onlookers.present(input, h0, c0, *weights):
        return autograd.torch_layers(layers, input, batch_sizes, h0, c0, *weights)
    return torch_lstm.run(input, batch_sizes, h0, c0, weights, layers)


def _traced_layer(
    input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    out, h_n, c_n, _, _ = torch.ops.fastattn.lstm_layer(input, batch_sizes, h0, c0, weights, False, "torch")
    return out, h_n, c_n


def _needs_grad(input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if input.requires_grad or h0.requires_grad or c0.requires_grad:
        return True
    return any(weight.requires_grad for weight in weights)
