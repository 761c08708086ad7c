"""Loops over a cell, for tests of the steps that share their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastattn

INPUTS, HIDDEN, BATCH, STEPS = 5, 7, 3, 4
Cell = nn.LSTMCell


def pair(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Cell, Cell]:
    """Ours, and torch's in float64 with the same weights."""
    ours = fastattn.LSTMCell(INPUTS, HIDDEN, bias).to(dtype)
    theirs = Cell(INPUTS, HIDDEN, bias).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(STEPS, BATCH, INPUTS).to(dtype)


def walk(cell: Cell, x: Tensor) -> Tensor:
    """A loss that every step and state has a part in."""
    state, total = None, x.new_zeros(())
    for step in x.to(cell.weight_ih.dtype):
        state = cell(step, state)
        total = total + state[0].sin().sum() + 0.5 * state[1].sum()
    return total


def assert_same(ours: Cell, theirs: Cell, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=rtol, atol=atol)


def data_of(cell: Cell) -> Tensor:
    """The same numbers for both cells."""
    return torch.randn(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(3)).to(cell.weight_ih.dtype)


def interrupt(_: Tensor) -> None:
    """A hook that stops a backward."""
    raise KeyError("stop")
