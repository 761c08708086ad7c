"""Checks of the layer-normalised LSTM's arguments: nn.LSTM's exception types, messages that name the argument.

Shapes are compared for equality only, never ordered, so that a compiled module keeps one graph for every length.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.modules.memory import check_sizes as check_sizes
from fastattn.validation import autocast_enabled


def check_flags(**flags: Any) -> None:
    """Raises TypeError for anything but True and False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {type(flag).__name__}, expected True or False")


def _check_number(name: str, number: Any, expected: str) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: got {type(number).__name__}, expected {expected}")


def check_probabilities(**probabilities: Any) -> None:
    """Raises TypeError for what is no number, ValueError outside [0, 1]."""
    for name, probability in probabilities.items():
        _check_number(name, probability, "a float in [0, 1]")
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"{name}: got {probability}, allowed is [0, 1]")


def check_numbers(eps: Any, forget_bias: Any) -> None:
    """Raises TypeError for what is no number, ValueError for an eps that is not positive."""
    _check_number("eps", eps, "a positive float")
    if not eps > 0.0:
        raise ValueError(f"eps: got {eps}, expected a positive float")
    if forget_bias is not None:
        _check_number("forget_bias", forget_bias, "a float or None")


def zoneout_pair(zoneout: Any) -> tuple[float, float]:
    """The probabilities of the hidden and of the cell state.

    Raises TypeError for anything but a number or two, ValueError outside [0, 1].
    """
    pair = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if len(pair) != 2:
        raise ValueError(f"zoneout: got {len(pair)} numbers, expected one, or two: hidden and cell state")
    for probability in pair:
        check_probabilities(zoneout=probability)
    return float(pair[0]), float(pair[1])


def check_input(input: Any, features: int, weight: Tensor, ranks: tuple[int, ...] = (2, 3)) -> None:
    """Type, rank, features, dtype and device of the input, in the order of nn.LSTM's checks.

    Raises AttributeError for what is no tensor (nor packed, where ``ranks`` are those of a sequence), ValueError for a
    wrong rank or dtype, RuntimeError for other features or another device.
    """
    packed = isinstance(input, PackedSequence) and ranks == (2, 3)
    tensor = input.data if packed else input
    if not isinstance(tensor, Tensor):
        also = " or a PackedSequence" if ranks == (2, 3) else ""
        raise AttributeError(f"input: got {type(tensor).__name__}, expected a torch.Tensor{also}")
    if packed and tensor.dim() != 2:
        raise RuntimeError(f"input: got packed data of {tensor.dim()} dimensions, expected 2")
    if tensor.dim() not in ranks:
        raise ValueError(f"input: got {tensor.dim()} dimensions, expected {ranks[1]}, or {ranks[0]} without a batch")
    if tensor.device != weight.device:
        raise RuntimeError(f"input: got device {tensor.device}, expected the parameters' {weight.device}")
    if tensor.dtype != weight.dtype and not autocast_enabled(tensor.device.type):
        raise ValueError(f"input: got dtype {tensor.dtype}, expected the parameters' {weight.dtype}")
    if not tensor.is_floating_point():
        raise ValueError(f"input: got dtype {tensor.dtype}, expected a floating-point type")
    if tensor.shape[-1] != features:
        raise RuntimeError(f"input: got {tensor.shape[-1]} features, expected input_size = {features}")


def check_steps(time_first: Tensor) -> None:
    """Raises RuntimeError, torch's, for a sequence without a step."""
    if time_first.shape[0] == 0:
        raise RuntimeError("input: got a sequence of 0 steps, expected at least 1")


def states(hx: Any, rank: int) -> tuple[Tensor, Tensor] | None:
    """The pair hx, or None.

    Raises TypeError for anything else, RuntimeError for another number of dimensions.
    """
    if hx is None:
        return None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(state, Tensor) for state in hx):
        got = f"{len(hx)} elements" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx: got {got}, expected a pair of tensors, the hidden and the cell state")
    for state in hx:
        if state.dim() != rank:
            raise RuntimeError(f"hx: got a state of {state.dim()} dimensions, expected {rank} beside this input")
    return hx[0], hx[1]


def check_states(states: tuple[Tensor, Tensor], shape: tuple[int, ...], input: Tensor) -> None:
    """Both states have ``shape`` and the input's dtype and device; dtypes may differ under autocast.

    Raises RuntimeError.
    """
    for name, state in zip(("hidden", "cell"), states, strict=True):
        if tuple(state.shape) != shape:
            raise RuntimeError(f"hx: got a {name} state of shape {tuple(state.shape)}, expected {shape}")
        if state.device != input.device:
            raise RuntimeError(f"hx: got a {name} state on {state.device}, expected the input's {input.device}")
        if state.dtype != input.dtype and not autocast_enabled(input.device.type):
            raise RuntimeError(f"hx: got a {name} state of dtype {state.dtype}, expected the input's {input.dtype}")
