"""The eager definition of the LSTM operators: plain PyTorch, one step after another, differentiable to any order.

Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as in ``torch.nn.LSTM``; the projection is
that of Sak et al. 2014 (arXiv:1402.1128):

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    c_t = f c_{t-1} + i g,    m_t = o tanh(c_t),    h_t = W_hr m_t, or m_t without a projection
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Bound at import: a program may rebind torch.nn.functional's.
_linear = torch.nn.functional.linear


def lstm_layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in D directions; the second reads the sequence from its end.

    Names: T steps, B batch, I input features, H hidden units, P = projection size or H, N rows of all steps together.

    Args:
        input: (T, B, I); or packed (N, I), step after step, the first ``batch_sizes[t]`` rows of the batch at step t.
        batch_sizes: (T) integers, never increasing, for packed input; None for padded input. In the second direction
            row b of a packed batch begins at its own last step.
        h0: (D, B, P).
        c0: (D, B, H).
        weights: per direction W_ih (4H, I), W_hh (4H, P), then where there are biases b_ih (4H), b_hh (4H), then
            where there is a projection W_hr (P, H); gates in the order i, f, g, o.
        compute_dtype: the dtype of the arithmetic; None for the input's own, float32 where that is narrower.

    Returns out (T, B, D P) or (N, D P), h_n (D, B, P) and c_n (D, B, H), in the dtype of the input.
    """
    dtype = input.dtype
    if compute_dtype is None:
        compute_dtype = torch.promote_types(dtype, torch.float32)
    steps, batch = input.shape[0], h0.shape[1]
    sizes = [batch] * steps if batch_sizes is None else batch_sizes.tolist()
    rows = (input.flatten(0, 1) if batch_sizes is None else input).to(compute_dtype)
    directions = h0.shape[0]
    per_direction = len(weights) // directions
    with _no_autocast(input.device.type):
        found = [
            _direction(
                rows, sizes, h0[place].to(compute_dtype), c0[place].to(compute_dtype),
                [weight.to(compute_dtype) for weight in weights[place * per_direction : (place + 1) * per_direction]],
                backwards=place == 1,
            )
            for place in range(directions)
        ]  # fmt: skip
    out, h_n, c_n = zip(*found, strict=True)
    merged = torch.cat(out, -1).to(dtype)
    if batch_sizes is None:
        merged = merged.unflatten(0, (steps, batch))
    return merged, torch.stack(h_n).to(dtype), torch.stack(c_n).to(dtype)


def _direction(
    rows: Tensor, sizes: list[int], h: Tensor, c: Tensor, weights: list[Tensor], backwards: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of all steps (N, P), and the last of each row of the batch (B, P), (B, H)."""
    weight_ih, weight_hh = weights[:2]
    bias_ih, bias_hh = weights[2:4] if len(weights) >= 4 else (None, None)
    projection = weights[-1] if len(weights) % 2 else None
    from_input = _linear(rows, weight_ih, bias_ih).split(sizes)
    steps = range(len(sizes))
    found: list[Tensor] = [rows.new_empty(0, h.shape[-1])] * len(sizes)
    for step in reversed(steps) if backwards else steps:
        size = sizes[step]
        i, f, g, o = (from_input[step] + _linear(h[:size], weight_hh, bias_hh)).chunk(4, -1)
        cell = f.sigmoid() * c[:size] + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        if projection is not None:
            hidden = _linear(hidden, projection)
        found[step] = hidden
        # The rows after these have ended; read from the end, they have not begun, and hold their initial state.
        h, c = torch.cat((hidden, h[size:])), torch.cat((cell, c[size:]))
    return torch.cat(found) if found else rows.new_empty(0, h.shape[-1]), h, c


def _no_autocast(device_type: str) -> Any:
    # The meta device has no autocast, and asking for it is an error.
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
