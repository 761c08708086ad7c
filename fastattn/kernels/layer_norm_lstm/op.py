"""The operators of the layer-normalised LSTM: schema, shape rule, autograd and autocast.

| operator (torch.ops.fastattn)     | returns                                        |
|-----------------------------------|------------------------------------------------|
| layer_norm_lstm_layer             | out, cells, h_n, c_n, saved                    |
| layer_norm_lstm_layer_backward    | gradients of input, h0, c0 and of each weight  |

One call is one layer in D directions (1, or 2: the second reads each sequence from its end). LN normalises over all its
features, 4H for the two projections and H for the cell (Ba, Kiros and Hinton 2016, equations 20 to 22):

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid (gain_ih LN(W_ih x_t) + gain_hh LN(W_hh (m h_{t-1})) + bias)
    c' = f c_{t-1} + i g,   h' = o tanh(gain_c LN(c') + bias_c)
    c_t = z_c ? c_{t-1} : c',   h_t = z_h ? h_{t-1} : h'        (zoneout, Krueger et al. 2017)

Arguments, T steps, B batch, N rows of all steps together:

input (T, B, I), or packed (N, I): step after step, step t the first batch_sizes[t] rows of the batch; batch_sizes (T),
int64 on the CPU, never increasing, each at least 1; h0 and c0 (D, B, H); weights, per direction W_ih (4H, I), W_hh
(4H, H), gain_ih (4H), gain_hh (4H), gain_c (H) and, where there are biases, bias (4H) and bias_c (H), all in input's
dtype; h_mask, the m above, (B, D, H) for all steps or (N, D, H), floating, no gradient; zoneout_h and zoneout_c, the z
above, (N, D, H) boolean, or None and keep_h, keep_c, the probability of z for which the expectation is taken, 0 for no
zoneout; save: a gradient will be wanted; all_cells: return cells, (T, B, D H) or (N, D H), else it is empty (0);
backend "cpu" or "cuda" (the C++ of ``csrc`` for tensors there: float32, float16, bfloat16), or "eager" (the definition,
any dtype and device).

out (T, B, D H) or (N, D H), h_n and c_n (D, B, H); saved float32, known to the backend alone, empty (0) unless ``save``
and without a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.layer_norm_lstm import autograd, eager, extension

_PROBLEM = (
    "Tensor input, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, Tensor? h_mask, Tensor? zoneout_h, "
    "Tensor? zoneout_c, float keep_h, float keep_c, float eps"
)
_SCHEMAS = {
    "layer_norm_lstm_layer": (
        f"({_PROBLEM}, bool save, bool all_cells, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "layer_norm_lstm_layer_backward": (
        "(Tensor? grad_out, Tensor? grad_cells, Tensor? grad_h_n, Tensor? grad_c_n, Tensor out, Tensor saved, "
        f"{_PROBLEM}, bool input_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor[])"
    ),
}
_BACKENDS: dict[str, Any] = {**extension.KERNELS, "eager": eager}

_library = torch.library.Library("fastattn", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _implementation(name: str) -> Any:
    def call(*args: Any) -> Any:
        *arguments, backend = args
        return getattr(_BACKENDS[backend], name.removeprefix("layer_norm_lstm_"))(*arguments)

    call.__name__ = name
    return call


for _name in _SCHEMAS:
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation(_name), _key)


# Shape rules -------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::layer_norm_lstm_layer", lib=_library)
def _layer_fake(
    input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    save, all_cells, backend = rest[-3:]
    directions, _, hidden = h0.shape
    out = input.new_empty(*input.shape[:-1], directions * hidden)
    cells = out.new_empty(out.shape) if all_cells else out.new_empty(0)
    steps = math.prod(input.shape[:-1])
    floats = directions * steps * extension.saved_floats(hidden, backend) if save and backend != "eager" else 0
    return out, cells, h0.new_empty(h0.shape), c0.new_empty(c0.shape), input.new_empty(floats, dtype=torch.float32)


@torch.library.register_fake("fastattn::layer_norm_lstm_layer_backward", lib=_library)
def _layer_backward_fake(
    grad_out: Tensor | None, grad_cells: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, out: Tensor,
    saved: Tensor, input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor], *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dinput = input.new_empty(input.shape if rest[-2] else (0,))
    return (
        dinput, h0.new_empty(h0.shape), c0.new_empty(c0.shape), [weight.new_empty(weight.shape) for weight in weights],
    )  # fmt: skip


# Autograd ----------------------------------------------------------------------------------------------------

torch.library.register_autograd(
    "fastattn::layer_norm_lstm_layer", autograd.layer_vjp, setup_context=autograd.setup_layer, lib=_library
)


# Autocast ----------------------------------------------------------------------------------------------------


def _autocast(device_type: str, key: Any) -> Any:
    """Cast input, states and weights to the autocast dtype; the masks keep theirs."""
    overload = torch.ops.fastattn.layer_norm_lstm_layer.default
    guard = torch._C.DispatchKeySet(key)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device_type))

    def call(
        input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor], *rest: Any
    ) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(guard):
            return overload(cast(input), batch_sizes, cast(h0), cast(c0), [cast(weight) for weight in weights], *rest)

    return call


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("layer_norm_lstm_layer", _autocast(_device, getattr(torch._C.DispatchKey, _key)), _key)
