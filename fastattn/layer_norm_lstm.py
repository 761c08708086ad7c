"""One layer of the layer-normalised LSTM on the backend that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch, reference_layer_norm_lstm, transforms
from fastattn.dispatch import Backend, Explanation
from fastattn.kernels.layer_norm_lstm import autograd, extension, op  # noqa: F401 : importing op defines the operators
from fastattn.validation import autocast_enabled

autograd.definition["layer"] = reference_layer_norm_lstm.layer

_BECAUSE = {
    Backend.CUDA: "our CUDA kernels, verified on this device",
    Backend.CPU: "our C++ kernel",
    Backend.REFERENCE: "plain PyTorch serves every request",
}


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
    if name not in _BECAUSE:
        return "it has no layer-normalised LSTM"
    if device_type != name.value:
        return f"device {device_type}; these kernels run on {name.value}"
    if transforms.transformed():
        return transforms.REASON
    if dtype not in extension.DTYPES:
        return f"dtype {dtype}; our kernels take float16, bfloat16 and float32"
    return extension.KERNELS[name.value].why_unavailable()


def choose(device_type: str, dtype: torch.dtype) -> Backend:
    """The forced backend if there is one, else our kernels for the device where they can serve the call.

    Kernels that no such device has verified wait to be asked for. Raises RuntimeError when a forced backend cannot
    serve the call.
    """
    forced = dispatch.forced_backend()
    if forced is None:
        usual = {"cpu": Backend.CPU, "cuda": Backend.CUDA}.get(device_type, Backend.REFERENCE)
        if why_not(usual, device_type, dtype) or _waits(usual):
            return Backend.REFERENCE
        return usual
    reason = why_not(forced, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f'fastattn.backend("{forced}") cannot serve this call: {reason}')
    return forced


def explain(device_type: str, dtype: torch.dtype) -> Explanation:
    """What ``choose`` takes, with the reasons; raises its errors."""
    chosen, forced = choose(device_type, dtype), dispatch.forced_backend()
    because = _BECAUSE[chosen] if forced is None else f'forced by fastattn.backend("{forced}")'
    skipped = {
        name: why_not(name, device_type, dtype) or _not_preferred(name, chosen)
        for name in dispatch.LSTM_BACKENDS
        if name is not chosen
    }
    return Explanation(chosen, because, skipped)


def _waits(name: Backend) -> bool:
    return name is Backend.CUDA and not extension.verified()


def _not_preferred(name: Backend, chosen: Backend) -> str:
    if _waits(name):
        return 'not verified on this device; force it with fastattn.backend("cuda")'
    return f"can serve it; {chosen} is preferred"


def _operator_backend(device_type: str, dtype: torch.dtype) -> str | None:
    """The operator's backend; None for the definition without an operator."""
    chosen = choose(device_type, dtype)
    if chosen is not Backend.REFERENCE:
        return chosen.value
    # A compiler would unroll the loop over the steps, and cannot where their number is in batch_sizes.
    return "eager" if torch.compiler.is_compiling() else None
