"""Modules, inputs and comparisons that the tests of the LSTM modules share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastattn

# Bound here: a test may rebind torch.nn.LSTM to ours.
TorchLSTM, TorchLSTMCell = nn.LSTM, nn.LSTMCell
INPUTS, HIDDEN, STEPS, BATCH = 5, 4, 6, 3
SORTED, UNSORTED = (6, 4, 1), (2, 6, 1)
OPTIONS: list[dict[str, Any]] = [
    {"num_layers": layers, "bidirectional": bidirectional, "proj_size": projection, "bias": bias}
    for layers, bidirectional, projection, bias in itertools.product((1, 2), (False, True), (0, 3), (True, False))
]


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.LSTM, fastattn.LSTM]:
    """torch's module and ours with the same weights."""
    theirs = TorchLSTM(INPUTS, HIDDEN, **options).to(dtype)
    ours = fastattn.LSTM(INPUTS, HIDDEN, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def padded(batch_first: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((BATCH, STEPS, INPUTS) if batch_first else (STEPS, BATCH, INPUTS)).to(dtype)


def packed(x: Tensor, lengths: tuple[int, ...] = SORTED, batch_first: bool = False) -> PackedSequence:
    in_order = list(lengths) == sorted(lengths, reverse=True)
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=in_order)


def states(module: Any, batch: int | None = BATCH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    rows = () if batch is None else (batch,)
    hidden = module.proj_size or module.hidden_size
    return torch.randn(count, *rows, hidden).to(dtype), torch.randn(count, *rows, module.hidden_size).to(dtype)


def flat(result: Any) -> list[Tensor]:
    """out, h_n, c_n; the data of a packed output."""
    out, (h_n, c_n) = result
    return [out.data if isinstance(out, PackedSequence) else out, h_n, c_n]


def gradients(result: Any, leaves: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
    loss = sum(part.square().sum() for part in flat(result))
    return list(torch.autograd.grad(loss, leaves, retain_graph=retain_graph))


def assert_same(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
