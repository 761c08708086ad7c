"""Which backend serves an LSTM call, and for each other one the reason why it does not.

| backend   | what it is                                         | serves                                       |
|-----------|----------------------------------------------------|----------------------------------------------|
| cuda      | our CUDA kernels                                   | float32, float16, bfloat16 on CUDA           |
| cpu       | our C++ kernels                                    | float32, float16, bfloat16 on the CPU        |
| torch     | torch's own LSTM: oneDNN, cuDNN, or step by step   | everything outside torch.func's transforms   |
| reference | plain PyTorch, one step after another              | everything                                   |
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastattn import transforms
from fastattn.dispatch import LSTM_BACKENDS, Backend, Explanation, forced_backend
from fastattn.kernels.lstm import extension

_BECAUSE = {
    Backend.CUDA: "our CUDA kernels, verified on this device",
    Backend.CPU: "our C++ kernels",
    Backend.TORCH: "torch's own LSTM",
    Backend.REFERENCE: "plain PyTorch serves every request",
}


def why_not(name: Backend, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason ``name`` cannot serve a call with tensors of this device and dtype; None when it can."""
    if name not in LSTM_BACKENDS:
        return f"it serves attention; an LSTM runs on {', '.join(LSTM_BACKENDS)}"
    if name is Backend.REFERENCE:
        return None
    if transforms.transformed():
        return transforms.REASON
    if name is Backend.TORCH:
        return None
    if device_type != name.value:
        return f"device {device_type}; these kernels run on {name.value}"
    if dtype not in extension.DTYPES:
        return f"dtype {dtype}; our kernels take float16, bfloat16 and float32"
    return extension.why_unavailable(name.value)


def choose(device_type: str, dtype: torch.dtype) -> Backend:
    """The forced backend if there is one, else the first in the order of preference that can serve the call.

    Raises RuntimeError when a forced backend cannot serve it.
    """
    forced = forced_backend()
    if forced is None:
        for name in _order(device_type):
            if why_not(name, device_type, dtype) is None:
                return name
        return Backend.REFERENCE
    reason = why_not(forced, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f'fastattn.backend("{forced}") cannot serve this call: {reason}')
    return forced


def _order(device_type: str) -> tuple[Backend, ...]:
    if device_type == "cpu":
        return (Backend.CPU, Backend.TORCH)
    if device_type == "cuda" and extension.verified():
        return (Backend.CUDA, Backend.TORCH)
    return (Backend.TORCH,)


def explain(device_type: str, dtype: torch.dtype) -> Explanation:
    """What ``choose`` takes, with the reasons; raises its errors."""
    chosen, forced = choose(device_type, dtype), forced_backend()
    because = _BECAUSE[chosen] if forced is None else f'forced by fastattn.backend("{forced}")'
    skipped = {
        name: why_not(name, device_type, dtype) or _not_preferred(name, chosen)
        for name in LSTM_BACKENDS
        if name is not chosen
    }
    return Explanation(chosen, because, skipped)


def _not_preferred(name: Backend, chosen: Backend) -> str:
    if name is Backend.CUDA and not extension.verified():
        return 'not verified on this device; force it with fastattn.backend("cuda")'
    return f"can serve it; {chosen} is preferred"


# Layers of a stack on CUDA -----------------------------------------------------------------------------------


def why_in_turn(layers: int, bidirectional: bool, projection: int, dropout: float) -> str | None:
    """The reason why the layers of our CUDA kernels run one after another, whatever their sizes; None: those decide."""
    if layers == 1:
        return "there is one"
    if bidirectional:
        return "each reads both ends of the one below"
    if projection:
        return "projections run step by step"
    if dropout > 0.0:
        return "dropout stands between them"
    return None


def with_layers(
    explanation: Explanation, reason: str | None, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> Explanation:
    """``explanation`` with how our CUDA kernels run several layers, of sizes (layers, steps, batch, units).

    ``reason`` is that of ``why_in_turn``.
    """
    forward = backward = 1
    if reason is None:
        forward, backward = extension.layers_together(dtype, *sizes)
        reason = "too few steps to cut, or no two fit on this device"
    if forward == backward == 1:
        how = f"layers one after another: {reason}"
    else:
        how = f"layers side by side, {forward} of {sizes[0]} in the forward and {backward} in the backward"
    return replace(explanation, because=f"{explanation.because}; {how}")
