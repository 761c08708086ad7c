"""The LSTM of ``csrc`` behind the operators: float32, float16 and bfloat16, on the CPU and on CUDA.

``csrc/lstm.h`` says what every tensor is; the extension checks what it is given.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.built import UNAVAILABLE as _NOT_BUILT
from fastattn.kernels.built import extension as _extension

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))
# Compute capabilities on which the whole GPU test suite has passed. Only these may be chosen without being asked for:
# a path that never ran on a real device is not a default.
VERIFIED: frozenset[tuple[int, int]] = frozenset()

# Per backend: (input, batch_sizes, h0, c0, weights, save) -> out, h_n, c_n, gates, cells;
# (grad_out, grad_h_n, grad_c_n, input, batch_sizes, h0, c0, weights, out, gates, cells, input_grad=True,
# weights_grad=True) -> gradients of input, h0, c0 and weights, None or without meaning where not wanted.
_NAMES = {"cpu": ("lstm_forward", "lstm_backward"), "cuda": ("lstm_forward_cuda", "lstm_backward_cuda")}
forward: dict[str, Any] = {name: getattr(_extension, names[0], None) for name, names in _NAMES.items()}
backward: dict[str, Any] = {name: getattr(_extension, names[1], None) for name, names in _NAMES.items()}
# Of a stack of layers in one direction without projections: (input, batch_sizes, h0, c0, weights, save) -> out, h_n,
# c_n, gates, cells, states; (grad_out, grad_h_n, grad_c_n, input, batch_sizes, h0, c0, weights, out, gates, cells,
# states) -> gradients of input, h0, c0 and weights.
layers_forward: dict[str, Any] = {"cuda": getattr(_extension, "lstm_layers_forward_cuda", None)}
layers_backward: dict[str, Any] = {"cuda": getattr(_extension, "lstm_layers_backward_cuda", None)}
# (dtype, layers, steps, batch, hidden) -> how many layers run side by side, in the forward and in the backward.
layers_together: Any = getattr(_extension, "lstm_cuda_layers_together", None)
# Of a cell on the CPU, input (B, I) and states (B, H): (input, h0, c0, weights, save) -> h_1, c_1, gates, cells, the
# last two None unless ``save``.
cell_forward: Any = getattr(_extension, "lstm_cell_forward", None)
# Of one step on the CPU, a cell's or a layer's: (grad_out, grad_h_n, grad_c_n, input, h0, c0, weights, gates, cells,
# input_grad) -> gradients of input, h0, c0 and of the step's sums (B, 4H). A cell has no grad_out.
step_backward: Any = getattr(_extension, "lstm_step_backward", None)


def why_unavailable(backend: str) -> str | None:
    """The reason the extension cannot run on this kind of device, "cpu" or "cuda"; None when it can."""
    if _NOT_BUILT is not None:
        return _NOT_BUILT
    if forward[backend] is None:
        device = "" if backend == "cpu" else " for CUDA"
        return f"the C++ extension fastattn._C was built without the LSTM{device}; run: pip install -e ."
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None


def verified() -> bool:
    """Whether the current CUDA device has passed the GPU tests."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() in VERIFIED
