"""One layer of the layer-normalised LSTM on the backend that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch, reference_layer_norm_lstm
from fastattn.dispatch import Backend
from fastattn.kernels.layer_norm_lstm import autograd, extension, op  # noqa: F401 : importing op defines the operators
from fastattn.validation import autocast_enabled

autograd.definition["layer"] = reference_layer_norm_lstm.layer

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Noise(NamedTuple):
    """What is drawn for one call, or expected of it; each part as in ``fastattn.kernels.layer_norm_lstm.op``."""

    h_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    keep_h: float = 0.0
    keep_c: float = 0.0


def layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    noise: Noise,
    eps: float,
    all_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, cells, h_n and c_n of one layer; cells without meaning unless ``all_cells``.

    Shapes, dtypes and equations: ``fastattn.kernels.layer_norm_lstm.op``. Under autocast input, states and weights
    come down to its dtype.

    Raises RuntimeError where a backend forced with ``fastattn.backend`` cannot serve the call.
    """
    device_type = input.device.type
    autocast = autocast_enabled(device_type)
    if autocast:
        dtype = torch.get_autocast_dtype(device_type)
        input, h0, c0, *weights = (
            tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (input, h0, c0, *weights)
        )
    backend = _choose(device_type, input.dtype)
    if backend is None:
        with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
            return reference_layer_norm_lstm.layer(input, batch_sizes, h0, c0, weights, *noise, eps)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, h0, c0, *weights))
    out, cells, h_n, c_n, _ = torch.ops.fastattn.layer_norm_lstm_layer(
        input, batch_sizes, h0, c0, list(weights), *noise, eps, save, all_cells, backend
    )
    return out, cells, h_n, c_n


def _choose(device_type: str, dtype: torch.dtype) -> str | None:
    """The operator's backend; None for the definition without an operator."""
    forced, reason = dispatch.forced_backend(), None
    if device_type != "cpu":
        reason = f"device {device_type}; the C++ kernel runs on the CPU"
    elif torch._C._are_functorch_transforms_active():
        reason = "inside a transform of torch.func; only plain PyTorch follows every one"
    elif dtype not in _KERNEL_DTYPES:
        reason = f"dtype {dtype}; the C++ kernel takes float16, bfloat16 and float32"
    else:
        reason = extension.UNAVAILABLE
    if forced in (None, Backend.CPU) and reason is None:
        return "cpu"
    if forced is None or forced is Backend.REFERENCE:
        # A compiler would unroll the loop over the steps, and cannot where their number is in batch_sizes.
        return "eager" if torch.compiler.is_compiling() else None
    if forced is not Backend.CPU:
        reason = "it has no layer-normalised LSTM"
    raise RuntimeError(f'fastattn.backend("{forced}") cannot serve this call: {reason}')
