"""What LSTM and LSTMCell share: how the weights are read, the checks of their tensors, and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import double_backward, reference_lstm  # noqa: F401  double_backward registers itself
from fastattn.dispatch import Backend
from fastattn.kernels import onlookers
from fastattn.kernels.lstm import layer as kernels
from fastattn.validation import autocast_enabled

State = tuple[Tensor, Tensor]


def check_state(owner: str, hx: Any) -> None:
    """Raise TypeError or ValueError unless ``hx`` is two tensors."""
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{owner}: hx: got {type(hx).__name__}, expected a tuple of two tensors (h_0, c_0) or None")
    if len(hx) != 2:
        raise ValueError(f"{owner}: hx: got {len(hx)} items, expected two tensors (h_0, c_0)")
    for place, tensor in enumerate(hx):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{owner}: hx[{place}]: got {type(tensor).__name__}, expected a torch.Tensor")


def check_alike(
    owner: str, input: Tensor, names: Sequence[str], tensors: Sequence[Tensor], dtypes: bool
) -> None:
    """Raise RuntimeError unless all tensors have the input's device, and its dtype where ``dtypes`` asks for it."""
    if onlookers.alike(input, *tensors):
        return
    device, dtype = input.device, input.dtype
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device != device:
            raise RuntimeError(f"{owner}: {name}: got device {tensor.device}, expected the input's {device}")
        if dtypes and tensor.dtype != dtype:
            raise RuntimeError(f"{owner}: {name}: got dtype {tensor.dtype}, expected the input's {dtype}")


def check_layout(owner: str, input: Tensor) -> None:
    """Raise ValueError for an input that is no dense tensor."""
    if input.is_nested:
        raise ValueError(f"{owner}: input: got a nested tensor, expected a dense one or a PackedSequence")
    if input.layout is not torch.strided:
        raise ValueError(f"{owner}: input: got layout {input.layout}, expected torch.strided")


def autocast_dtype(input: Tensor, others: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype in which autocast wants the arithmetic; None where it is off, or all is float64, which it leaves."""
    device_type = input.device.type
    if not autocast_enabled(device_type):
        return None
    if input.dtype == torch.float64 and all(tensor.dtype == torch.float64 for tensor in others):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> Any:
    """A context in which nothing is cast any more."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else contextlib.nullcontext()


def layer(
    backend: Backend, input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """out, h_n and c_n of one layer on ``backend``; arguments as in ``fastattn.reference_lstm.lstm_layer``."""
    if backend is Backend.REFERENCE:
        return reference_lstm.lstm_layer(input, batch_sizes, h0, c0, weights)
    if backend is Backend.TORCH:
        return kernels.torch_layers(1, input, batch_sizes, h0, c0, weights)
    return kernels.lstm_layer(backend.value, input, batch_sizes, h0, c0, weights)


def cell(backend: Backend, input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor]) -> State:
    """h_1 and c_1 (B, H) of one step on input (B, I) from h0 and c0 (B, H), on ``backend``."""
    found = kernels.lstm_cell(input, h0, c0, weights) if backend is Backend.CPU else None
    if found is None:
        _, h_1, c_1 = layer(backend, input.unsqueeze(0), None, h0.unsqueeze(0), c0.unsqueeze(0), weights)
        found = h_1.squeeze(0), c_1.squeeze(0)
    return found
