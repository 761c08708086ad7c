"""One layer of the layer-normalised LSTM on the backend that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch, reference_layer_norm_lstm
from fastattn.dispatch import Backend, Explanation
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
    backend = _operator_backend(device_type, input.dtype)
    if backend is None:
        with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
            return reference_layer_norm_lstm.layer(input, batch_sizes, h0, c0, weights, *noise, eps)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, h0, c0, *weights))
    out, cells, h_n, c_n, _ = torch.ops.fastattn.layer_norm_lstm_layer(
        input, batch_sizes, h0, c0, list(weights), *noise, eps, save, all_cells, backend
    )
    return out, cells, h_n, c_n


def why_not(name: Backend, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason ``name`` cannot serve a call with tensors of this device and dtype; None when it can."""
    if name is Backend.REFERENCE:
        return None
    if name is not Backend.CPU:
        return "it has no layer-normalised LSTM"
    if device_type != "cpu":
        return f"device {device_type}; the C++ kernel runs on the CPU"
    if torch._C._are_functorch_transforms_active():
        return "inside a transform of torch.func; only plain PyTorch follows every one"
    if dtype not in _KERNEL_DTYPES:
        return f"dtype {dtype}; the C++ kernel takes float16, bfloat16 and float32"
    return extension.UNAVAILABLE


def choose(device_type: str, dtype: torch.dtype) -> Backend:
    """The forced backend if there is one, else the C++ kernel where that can serve the call.

    Raises RuntimeError when a forced backend cannot serve it.
    """
    forced = dispatch.forced_backend()
    if forced is None:
        return Backend.REFERENCE if why_not(Backend.CPU, device_type, dtype) else Backend.CPU
    reason = why_not(forced, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f'fastattn.backend("{forced}") cannot serve this call: {reason}')
    return forced


def explain(device_type: str, dtype: torch.dtype) -> Explanation:
    """What ``choose`` takes, with the reasons; raises its errors."""
    chosen, forced = choose(device_type, dtype), dispatch.forced_backend()
    because = "our C++ kernel" if chosen is Backend.CPU else "plain PyTorch serves every request"
    if forced is not None:
        because = f'forced by fastattn.backend("{forced}")'
    skipped = {
        name: why_not(name, device_type, dtype) or f"can serve it; {chosen} is preferred"
        for name in dispatch.LSTM_BACKENDS
        if name is not chosen
    }
    return Explanation(chosen, because, skipped)


def _operator_backend(device_type: str, dtype: torch.dtype) -> str | None:
    """The operator's backend; None for the definition without an operator."""
    if choose(device_type, dtype) is Backend.CPU:
        return "cpu"
    # A compiler would unroll the loop over the steps, and cannot where their number is in batch_sizes.
    return "eager" if torch.compiler.is_compiling() else None
