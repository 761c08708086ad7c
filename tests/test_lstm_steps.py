"""Steps that share their weights (fastattn/kernels/lstm/steps.py): the gradients of a loop, taken once a backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lstm_steps_cases import BATCH, HIDDEN, INPUTS, STEPS, assert_same, data, data_of, pair, walk
from torch import Tensor, nn

import fastattn
from fastattn.kernels.lstm import extension, steps

pytestmark = pytest.mark.skipif(extension.why_unavailable("cpu") is not None, reason="needs the C++ extension")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_loop(bias: bool, dtype: torch.dtype) -> None:
    ours, theirs = pair(bias, dtype)
    x = data(dtype).requires_grad_()
    y = x.detach().double().requires_grad_()
    walk(ours, x).backward()
    walk(theirs, y).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same(ours, theirs, tolerance, tolerance * STEPS * BATCH)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=tolerance, atol=tolerance * 4)


def test_one_product_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[torch.Size] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        products.append(left.shape)
        return left @ right

    monkeypatch.setattr(steps, "mm", counted)
    walk(pair()[0], data()).backward()
    assert products == [(4 * HIDDEN, STEPS * BATCH)] * 2


def test_a_layer_called_a_step_at_a_time() -> None:
    ours, theirs = fastattn.LSTM(INPUTS, HIDDEN, num_layers=2), nn.LSTM(INPUTS, HIDDEN, num_layers=2).double()
    theirs.load_state_dict(ours.state_dict())
    x = data()
    for module, given in ((ours, x), (theirs, x.double())):
        state, total = None, given.new_zeros(())
        for step in given:
            out, state = module(step[None], state)
            total = total + out.sin().sum()
        total.backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_hh"])
def test_frozen_weights(frozen: str) -> None:
    ours, theirs = pair()
    for cell in (ours, theirs):
        getattr(cell, frozen).requires_grad_(False)
        walk(cell, data_of(cell)).backward()
    assert_same(ours, theirs)
    # In the same graph or not, a weight that thaws is no longer what it was.
    for cell in (ours, theirs):
        getattr(cell, frozen).requires_grad_(True)
        walk(cell, data_of(cell)).backward()
    assert_same(ours, theirs)


def test_gradients_of_the_states_alone() -> None:
    ours, theirs = pair()
    found, kept, before = [], [], set(steps._in_use)
    for cell in (ours, theirs):
        h, c = (torch.ones(BATCH, HIDDEN, dtype=cell.weight_ih.dtype, requires_grad=True) for _ in range(2))
        state = (h, c)
        for step in data_of(cell):
            state = cell(step, state)
        found.append(torch.autograd.grad(state[0].sum(), [h, c]))
        kept.append(state)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    (key,) = set(steps._in_use) - before
    assert not steps._in_use[key].pending  # nobody would come for it


def test_gradient_of_one_weight_alone() -> None:
    ours, theirs = pair()
    found = [torch.autograd.grad(walk(cell, data_of(cell)), cell.weight_hh)[0] for cell in (ours, theirs)]
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-5, atol=1e-5)


def test_a_graph_walked_twice_and_in_parts() -> None:
    ours, theirs = pair()
    for cell in (ours, theirs):
        state, losses = None, []
        for step in data_of(cell):
            state = cell(step, state)
            losses.append(state[0].sin().sum())
        losses[1].backward(retain_graph=True)
        losses[3].backward(retain_graph=True)
        (losses[0] + losses[3]).backward()
    assert_same(ours, theirs)


def test_graphs_that_live_at_the_same_time_are_apart() -> None:
    """States kept from one iteration to the next share the node of the weights' gradients."""
    ours, theirs = pair()
    for cell in (ours, theirs):
        x = data_of(cell)
        first, second = walk(cell, x), walk(cell, 2 * x)
        second.backward()
        first.backward()
    assert_same(ours, theirs)


def test_weights_updated_between_iterations() -> None:
    ours, theirs = pair()
    kept = []
    for cell in (ours, theirs):
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = walk(cell, data_of(cell))
            loss.backward()
            optimizer.step()
            kept.append(loss)  # and its graph
    assert_same(ours, theirs)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [7, 16])
def test_states_changed_in_place(hidden: int) -> None:
    """As a loop does that stops finished sequences: the backward needs no result as it was."""
    ours, theirs = fastattn.LSTMCell(INPUTS, hidden), nn.LSTMCell(INPUTS, hidden).double()
    theirs.load_state_dict(ours.state_dict())
    going = torch.tensor([[1.0], [0.0], [1.0]])
    for cell in (ours, theirs):
        state, total = None, going.new_zeros((), dtype=cell.weight_ih.dtype)
        for step in data_of(cell):
            state = cell(step, state)
            for tensor in state:
                tensor.mul_(going.to(tensor.dtype))
            total = total + state[0].sin().sum() + state[1].sum()
        total.backward()
    assert_same(ours, theirs)


def test_weights_that_an_attribute_stands_before() -> None:
    ours, theirs = pair()
    for cell in (ours, theirs):
        object.__setattr__(cell, "weight_ih", torch.zeros_like(cell.weight_ih))
    torch.testing.assert_close(walk(ours, data_of(ours)).double(), walk(theirs, data_of(theirs)))


def test_weights_changed_under_a_graph_are_refused() -> None:
    cell = pair()[0]
    loss = walk(cell, data())
    with torch.no_grad():
        cell.weight_ih.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_graph_is_gone_after_its_backward() -> None:
    loss = walk(pair()[0], data())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_through_a_loop() -> None:
    ours, theirs = pair()
    for cell in (ours, theirs):
        gradients = torch.autograd.grad(walk(cell, data_of(cell)), list(cell.parameters()), create_graph=True)
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
    assert_same(ours, theirs, 1e-4, 1e-4)


def test_same_bits_at_every_run() -> None:
    cell = pair()[0]
    found = [torch.autograd.grad(walk(cell, data_of(cell)), list(cell.parameters())) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"h0": torch.zeros(1, BATCH, HIDDEN + 1)},
        {"grad_out": torch.zeros(1, BATCH, HIDDEN + 1)},
        {"gates": torch.zeros(1)},
        {"cells": torch.zeros(BATCH, 1, 16, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_malformed_calls_of_the_extension(change: dict[str, Tensor]) -> None:
    weights = [torch.zeros(4 * HIDDEN, INPUTS), torch.zeros(4 * HIDDEN, HIDDEN)]
    zeros = torch.zeros(1, BATCH, HIDDEN)
    given: dict[str, Any] = {"input": torch.zeros(1, BATCH, INPUTS), "h0": zeros, "c0": zeros, "weights": weights}
    *_, gates, cells = extension.forward["cpu"](given["input"], None, zeros, zeros, weights, True)
    given = {"grad_out": zeros, "grad_h_n": None, "grad_c_n": None} | given | {"gates": gates, "cells": cells} | change
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        extension.step_backward(*given.values(), True)


def test_more_than_a_step_is_refused_by_the_extension() -> None:
    weights = [torch.zeros(4 * HIDDEN, INPUTS), torch.zeros(4 * HIDDEN, HIDDEN)]
    x, zeros = torch.zeros(2, BATCH, INPUTS), torch.zeros(1, BATCH, HIDDEN)
    *_, gates, cells = extension.forward["cpu"](x, None, zeros, zeros, weights, True)
    with pytest.raises(ValueError, match="got 2 steps in 1 directions, expected one padded step"):
        extension.step_backward(None, None, None, x, zeros, zeros, weights, gates, cells, True)


@pytest.mark.parametrize(
    "change",
    [
        {"input": torch.zeros(1, BATCH, INPUTS)},
        {"h0": torch.zeros(1, BATCH, HIDDEN)},
        {"c0": torch.zeros(BATCH, HIDDEN + 1)},
        {"weights": [torch.zeros(4 * HIDDEN, INPUTS)] * 2},
        {"grad_out": torch.zeros(BATCH, HIDDEN + 1)},
        {"grad_h_n": torch.zeros(1, BATCH, HIDDEN)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_malformed_calls_of_a_cell(change: dict[str, Any]) -> None:
    weights = [torch.zeros(4 * HIDDEN, INPUTS), torch.zeros(4 * HIDDEN, HIDDEN)]
    zeros, name = torch.zeros(BATCH, HIDDEN), next(iter(change))
    given: dict[str, Any] = {"input": torch.zeros(BATCH, INPUTS), "h0": zeros, "c0": zeros, "weights": weights}
    _, _, gates, cells = extension.cell_forward(*given.values(), True)
    kept = {"gates": gates, "cells": cells}
    grads = {"grad_out": None, "grad_h_n": zeros, "grad_c_n": None}
    with pytest.raises((ValueError, TypeError), match=name.replace("weights", r"weights\[")):
        extension.step_backward(*(grads | given | kept | change).values(), True)
    if name in given:
        with pytest.raises((ValueError, TypeError)):
            extension.cell_forward(*(given | change).values(), True)
