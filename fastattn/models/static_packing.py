"""A recurrent network over padded sequences inside a compiled graph, where no size may depend on the lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn.modules.lstm import LSTM
from fastattn.modules.recurrent import State


def run(lstm: LSTM, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
    """What ``lstm`` makes of sequences packed by torch and padded again, by operators whose sizes are known beforehand.

    A compiler refuses torch's packing: it makes as many rows as the lengths have steps, together, and as many batches
    as the longest. Here every sequence of n steps has a companion of S + 1 - n, and one more has S: whatever the
    lengths are, B (S + 1) + S rows in S batches, hardly more than the padded sequences have.

    Args:
        inputs: (B, S, I), B at least 1.
        lengths: (B,), int64 or int32, from 1 to S, on any device.

    Returns:
        The outputs (B, S, D P), 0 at padding, and the last states (layers D, B, P) and (layers D, B, H).

    Raises:
        IndexError: a length below 1 or above S; on a GPU the kernel's assertion.
    """
    batch, steps = inputs.shape[:2]
    lengths = lengths.to(inputs.device)
    every = torch.cat([lengths, steps + 1 - lengths, lengths.new_full((1,), steps)])
    ordered, order = every.sort(descending=True)
    place = order.argsort()
    times = torch.arange(steps, device=inputs.device)
    sizes = (ordered > times[:, None]).sum(1)
    ends = sizes.cumsum(0)
    starts = ends - sizes
    rows = torch.arange(batch * (steps + 1) + steps, device=inputs.device)
    time = torch.searchsorted(ends, rows, right=True)
    sequence = order[rows - starts[time]]
    # Companions read a first step, which is never padding: what stands there may be any number, and 0 times it NaN.
    data = inputs[sequence % batch, torch.where(sequence < batch, time, 0)]
    packed, (hidden, cell) = lstm(PackedSequence(data, sizes.cpu(), order, place))
    inside = times < lengths[:, None]
    outputs = packed.data[torch.where(inside, starts + place[:batch, None], 0)]
    return outputs.masked_fill(~inside.unsqueeze(-1), 0.0), (hidden[:, :batch], cell[:, :batch])
