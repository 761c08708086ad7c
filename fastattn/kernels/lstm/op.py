"""The LSTM operators: schema, shape rule and autograd; each backend's code is called from here.

| operator (torch.ops.fastattn)  | returns                                        |
|--------------------------------|------------------------------------------------|
| lstm_layer                     | out, h_n, c_n, gates, cells                    |
| lstm_layer_backward            | gradients of input, h0, c0 and of each weight  |
| lstm_layers                    | out, h_n, c_n, gates, cells, states            |
| lstm_layers_backward           | gradients of input, h0, c0 and of each weight  |

One call is one layer in D directions, 1 or 2. Names: T steps, B batch, I input features, H hidden units, P =
projection size or H, N rows of all steps together, Hr = H rounded up to 16.

input (T, B, I), or packed (N, I) with batch_sizes (T), int64 on the CPU, never increasing, each at least 1; h0
(D, B, P); c0 (D, B, H); weights per direction W_ih (4H, I), W_hh (4H, P), then where there are biases b_ih (4H),
b_hh (4H), then where there is a projection W_hr (P, H). One dtype and device. out (T, B, D P) or (N, D P), h_n
(D, B, P), c_n (D, B, H). What the backward needs, gates (N, D, 4 Hr) and cells (N, D, Hr) float32, is empty (0)
unless ``save``; a derivative is then taken by computing the layer again. backend "cpu", "cuda" (``csrc/lstm.h``) or
"torch", which keeps nothing. What it all means: ``fastattn.reference_lstm.lstm_layer``.

lstm_layers is a stack of L layers in one direction without projections, for backend "cuda" alone, which runs them side
by side where they fit. h0, c0, h_n and c_n are (L, B, H), the weights stand layer after layer, and what the backward
needs is gates (L, N, 4 Hr), cells (L, N, Hr) and states (L - 1, N, H), the outputs of all layers but the last.

Raises ValueError, TypeError: an argument does not fit the above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.lstm import autograd, extension, torch_lstm

_SCHEMAS = {
    "lstm_layer": (
        "(Tensor input, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, bool save, str backend) "
        "-> (Tensor out, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
    ),
    "lstm_layer_backward": (
        "(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, Tensor h0, "
        "Tensor c0, Tensor[] weights, Tensor out, Tensor gates, Tensor cells, str backend) "
        "-> (Tensor dinput, Tensor dh0, Tensor dc0, Tensor[] dweights)"
    ),
    "lstm_layers": (
        "(Tensor input, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, bool save, str backend) "
        "-> (Tensor out, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor states)"
    ),
    "lstm_layers_backward": (
        "(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, Tensor h0, "
        "Tensor c0, Tensor[] weights, Tensor out, Tensor gates, Tensor cells, Tensor states, str backend) "
        "-> (Tensor dinput, Tensor dh0, Tensor dc0, Tensor[] dweights)"
    ),
}
# The extension pads the hidden units of what it keeps to whole vectors.
_VECTOR = 16

_library = torch.library.Library("fastattn", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _serve(device: str, calls: dict[str, Any], torch_call: Any = None) -> Any:
    """The operator for tensors of ``device``, "cpu" or "cuda": the kernels of the same name, or torch's if any."""

    def call(*args: Any) -> Any:
        *arguments, backend = args
        if backend == "torch" and torch_call is not None:
            return torch_call(*arguments)
        if backend != device:
            allowed = f"allowed is {device!r}" if torch_call is None else f"allowed are {device!r} and 'torch'"
            raise ValueError(f"backend: got {backend!r} for tensors on {device}, {allowed}")
        reason = extension.why_unavailable(backend)
        if reason is not None:
            raise RuntimeError(f"backend: got {backend!r}, but {reason}")
        return calls[backend](*arguments)

    return call


for _device in ("cpu", "cuda"):
    _library.impl("lstm_layer", _serve(_device, extension.forward, torch_lstm.forward), _device.upper())
    _library.impl("lstm_layer_backward", _serve(_device, extension.backward, torch_lstm.backward), _device.upper())
_library.impl("lstm_layers", _serve("cuda", extension.layers_forward), "CUDA")
_library.impl("lstm_layers_backward", _serve("cuda", extension.layers_backward), "CUDA")


# Shape rules -------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::lstm_layer", lib=_library)
def _layer_fake(
    input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    directions, _, outputs = h0.shape
    rows = input.shape[:-1]
    padded = (c0.shape[2] + _VECTOR - 1) // _VECTOR * _VECTOR
    keep = save and backend != "torch"
    gates, cells = ((math.prod(rows), directions, many * padded) if keep else (0,) for many in (4, 1))
    return (
        input.new_empty((*rows, directions * outputs)), h0.new_empty(h0.shape), c0.new_empty(c0.shape),
        input.new_empty(gates), input.new_empty(cells, dtype=torch.float32),
    )  # fmt: skip


@torch.library.register_fake("fastattn::lstm_layers", lib=_library)
def _layers_fake(
    input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layers, _, hidden = h0.shape
    many = math.prod(input.shape[:-1])
    padded = (hidden + _VECTOR - 1) // _VECTOR * _VECTOR
    gates, cells, states = ((layers, many, 4 * padded), (layers, many, padded), (layers - 1, many, hidden))
    return (
        input.new_empty((*input.shape[:-1], hidden)), h0.new_empty(h0.shape), c0.new_empty(c0.shape),
        input.new_empty(gates if save else (0,)), input.new_empty(cells if save else (0,), dtype=torch.float32),
        input.new_empty(states if save else (0,)),
    )  # fmt: skip


@torch.library.register_fake("fastattn::lstm_layers_backward", lib=_library)
@torch.library.register_fake("fastattn::lstm_layer_backward", lib=_library)
def _layer_backward_fake(
    grad_out: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, input: Tensor,
    batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], *_: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dinput, dh0, dc0, *dweights = (tensor.new_empty(tensor.shape) for tensor in (input, h0, c0, *weights))
    return dinput, dh0, dc0, dweights


torch.library.register_autograd("fastattn::lstm_layer", autograd.vjp, setup_context=autograd.setup, lib=_library)
torch.library.register_autograd(
    "fastattn::lstm_layers", partial(autograd.vjp, stacked=True), setup_context=autograd.setup, lib=_library
)
