"""The eager definition of one layer of the layer-normalised LSTM: plain PyTorch, the oracle and the fallback.

What the equations, arguments and results are: ``fastattn.kernels.layer_norm_lstm.op``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    h_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
    compute_dtype: torch.dtype | None = None,
) -> Results:
    """out, cells, h_n and c_n in input's dtype; differentiable to any order in all floating inputs.

    The arithmetic is that of ``compute_dtype``: by default float64 for float64 and float32 for every other dtype.
    """
    dtype = input.dtype
    if compute_dtype is None:
        compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rows = input.reshape(-1, input.shape[-1]).to(compute_dtype)
    sizes = [input.shape[1]] * input.shape[0] if batch_sizes is None else batch_sizes.tolist()
    count = len(weights) // h0.shape[0]
    found = []
    for d in range(h0.shape[0]):
        direction = _direction(
            rows,
            sizes,
            (h0[d].to(compute_dtype), c0[d].to(compute_dtype)),
            [weight.to(compute_dtype) for weight in weights[d * count : (d + 1) * count]],
            None if h_mask is None else h_mask[:, d].to(compute_dtype),
            (None if zoneout_h is None else zoneout_h[:, d], None if zoneout_c is None else zoneout_c[:, d]),
            (keep_h, keep_c),
            eps,
            reverse=d == 1,
        )
        found.append(direction)
    outs, cells, h_n, c_n = zip(*found, strict=True)
    shape = (*input.shape[:-1], h0.shape[0] * h0.shape[2])
    return (
        torch.cat(outs, 1).to(dtype).view(shape),
        torch.cat(cells, 1).to(dtype).view(shape),
        torch.stack(h_n).to(dtype),
        torch.stack(c_n).to(dtype),
    )


def _direction(
    rows: Tensor,
    sizes: list[int],
    state: tuple[Tensor, Tensor],
    weights: list[Tensor],
    h_mask: Tensor | None,
    zoneout: tuple[Tensor | None, Tensor | None],
    keep: tuple[float, float],
    eps: float,
    reverse: bool,
) -> Results:
    """out (N, H), cells (N, H), h_n (B, H), c_n (B, H) of one direction over rows (N, I), step after step."""
    weight_ih, weight_hh, gain_ih, gain_hh, gain_c, *biases = weights
    bias, bias_c = biases if biases else (None, None)
    h, c = state
    batch, gates = h.shape[0], (weight_hh.shape[0],)
    # A gate's bias stands once in the sum; here the normalised input projection has it.
    projected = functional.layer_norm(functional.linear(rows, weight_ih), gates, gain_ih, bias, eps)
    per_step = h_mask is not None and h_mask.shape[0] == rows.shape[0]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    outs: list[Tensor] = [h[:0]] * len(sizes)
    cells: list[Tensor] = [c[:0]] * len(sizes)
    for t in range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes)):
        size, at = sizes[t], slice(ends[t] - sizes[t], ends[t])
        here_h, here_c = h[:size], c[:size]
        seen = here_h
        if h_mask is not None:
            seen = here_h * (h_mask[at] if per_step else h_mask[:size])
        sums = projected[at] + functional.layer_norm(functional.linear(seen, weight_hh), gates, gain_hh, None, eps)
        i, f, g, o = sums.chunk(4, 1)
        new_c = torch.sigmoid(f) * here_c + torch.sigmoid(i) * torch.tanh(g)
        new_h = torch.sigmoid(o) * torch.tanh(functional.layer_norm(new_c, gain_c.shape, gain_c, bias_c, eps))
        outs[t] = _zoneout(here_h, new_h, None if zoneout[0] is None else zoneout[0][at], keep[0])
        cells[t] = _zoneout(here_c, new_c, None if zoneout[1] is None else zoneout[1][at], keep[1])
        # Rows beyond `size` keep their state: they have ended, or begin at an earlier step in the reverse direction.
        h = outs[t] if size == batch else torch.cat((outs[t], h[size:]))
        c = cells[t] if size == batch else torch.cat((cells[t], c[size:]))
    return torch.cat(outs), torch.cat(cells), h, c


def _zoneout(previous: Tensor, new: Tensor, kept: Tensor | None, keep: float) -> Tensor:
    """The new state where ``kept`` is False, or the expectation with probability ``keep`` of the previous one."""
    if kept is not None:
        return torch.where(kept, previous, new)
    return new if keep == 0.0 else keep * previous + (1.0 - keep) * new
