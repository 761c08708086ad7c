"""Steps that share their weights (fastattn/kernels/lstm/steps.py): the gradients of a loop, taken once a backward."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.kernels.lstm import extension, steps

pytestmark = pytest.mark.skipif(extension.why_unavailable("cpu") is not None, reason="needs the C++ extension")

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


def data_of(cell: Cell) -> Tensor:
    """The same numbers for both cells."""
    return torch.randn(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(3)).to(cell.weight_ih.dtype)


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


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_steps(reentrant: bool) -> None:
    ours, theirs = pair()
    for cell in (ours, theirs):
        state = [torch.zeros(BATCH, HIDDEN, dtype=cell.weight_ih.dtype, requires_grad=True) for _ in range(2)]
        total: Any = 0

        def take(x: Tensor, h: Tensor, c: Tensor, cell: Cell = cell) -> tuple[Tensor, Tensor]:
            return cell(x, (h, c))

        for step in data_of(cell):
            state = checkpoint(take, step, *state, use_reentrant=reentrant) if cell is ours else take(step, *state)
            total = total + state[0].sin().sum()
        total.backward()
    assert_same(ours, theirs)


def test_hooks_of_a_weight_see_one_gradient() -> None:
    cell, seen = pair()[0], []
    cell.weight_hh.register_hook(lambda gradient: seen.append(gradient.clone()))
    cell.weight_hh.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    walk(cell, data()).backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_an_interrupted_backward_leaves_nothing_to_the_next() -> None:
    ours, theirs = pair()

    def interrupt(_: Tensor) -> None:
        raise KeyError("stop")

    for cell in (ours, theirs):
        x = data_of(cell)
        x[1].add_(0)
        leaf = x.requires_grad_()
        loss = walk(cell, leaf)
        state = cell(leaf[0])[0]
        handle = state.register_hook(interrupt)
        with pytest.raises(KeyError):
            (loss + cell(leaf[1], (state, state))[0].sum()).backward(retain_graph=True)
        handle.remove()
        cell.zero_grad()
        loss.backward()
    assert_same(ours, theirs)


def test_what_an_interrupted_backward_left_goes_with_its_graph() -> None:
    cell = pair()[0]
    weight = weakref.ref(cell.weight_ih)

    def interrupt(_: Tensor) -> None:
        raise KeyError("stop")

    state, total = None, torch.zeros(())
    for place, step in enumerate(data()):
        state = cell(step, state)
        total = total + state[0].sum()
        if place == 1:
            state[0].register_hook(interrupt)
    with pytest.raises(KeyError):
        total.backward()
    walk(pair()[0], data()).backward()  # the engine lets go of the exception
    del cell, state, total
    gc.collect()
    assert weight() is None


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, add = [], steps._Pending.add

    def watched(pending: steps._Pending, *rows: Tensor) -> None:
        add(pending, *rows)
        waiting.append(pending.waiting)

    monkeypatch.setattr(steps, "_ROWS", 2 * BATCH)
    monkeypatch.setattr(steps._Pending, "add", watched)
    ours, theirs = pair()
    for cell in (ours, theirs):
        walk(cell, data_of(cell)).backward()
    assert waiting == [BATCH, 0] * (STEPS // 2)
    assert_same(ours, theirs)


def test_weights_whose_data_were_replaced() -> None:
    """They have other nodes for their gradients, which hooks and ``inputs`` go by."""
    cell = pair()[0]
    kept = walk(cell, data())
    cell.half().float()
    walk(cell, data()).backward(inputs=[cell.weight_ih])
    assert cell.weight_ih.grad is not None
    assert torch.autograd.grad(walk(cell, data()), cell.weight_hh)[0].any()
    assert kept.requires_grad


def test_a_weight_frozen_after_the_forward() -> None:
    ours, theirs = pair()
    found = []
    for cell in (ours, theirs):
        loss = walk(cell, data_of(cell))
        cell.weight_ih.requires_grad_(False)
        found.append(torch.autograd.grad(loss, [cell.weight_hh], create_graph=True)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-5, atol=1e-5)


def test_compiled_autograd() -> None:
    ours, theirs = pair()
    walk(theirs, data_of(theirs)).backward()
    loss = walk(ours, data_of(ours))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert_same(ours, theirs)


def test_a_gradient_that_is_a_subclass() -> None:
    ours, theirs = pair()
    for cell in (ours, theirs):
        state = cell(data_of(cell)[0])[0]
        ones = torch.ones_like(state)
        torch.autograd.backward(state, TwoTensor(ones, ones))
        for weight in cell.parameters():
            assert isinstance(weight.grad, TwoTensor)
            weight.grad = weight.grad.a
    assert_same(ours, theirs)


def test_tensors_with_a_lazy_sign() -> None:
    ours, theirs = pair()
    for cell in (ours, theirs):
        x = torch._neg_view(data_of(cell)[0])
        state = cell(x)[0]
        state.backward(torch._neg_view(torch.ones_like(state)))
    assert_same(ours, theirs)


def test_nothing_outlives_the_graph() -> None:
    cell = pair()[0]
    gc.collect()
    before = set(steps._in_use)
    loss = walk(cell, data())
    (key,) = set(steps._in_use) - before
    loss.backward()
    assert not steps._in_use[key].pending
    weight = weakref.ref(cell.weight_ih)
    del loss, cell
    gc.collect()
    assert key not in steps._in_use
    assert weight() is None


def pickled(cell: Cell) -> Cell:
    restored: Cell = pickle.loads(pickle.dumps(cell))
    return restored


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_cell_is_copied_amid_a_loop(copied: Callable[[Cell], Cell]) -> None:
    ours, theirs = pair()
    loss = walk(ours, data_of(ours))
    other = copied(ours)
    walk(other, data_of(other)).backward()
    walk(theirs, data_of(theirs)).backward()
    assert_same(other, theirs)
    assert ours.weight_ih.grad is None
    loss.backward()
    assert_same(ours, theirs)


def test_a_cell_whose_dtype_changes_amid_a_loop() -> None:
    cell = pair()[0]
    kept = walk(cell, data())
    cell.to(torch.bfloat16)
    walk(cell, data(torch.bfloat16)).backward()
    assert cell.weight_ih.grad is not None
    assert cell.weight_ih.grad.dtype == torch.bfloat16
    assert kept.dtype == torch.float32


def test_python_threads_at_once() -> None:
    ours, theirs = pair()
    walk(theirs, data_of(theirs)).backward()
    found: list[Any] = [None] * 4

    def work(place: int) -> None:
        for _ in range(10):
            found[place] = torch.autograd.grad(walk(ours, data_of(ours)), list(ours.parameters()))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradients in found:
        for one, other in zip(gradients, theirs.parameters(), strict=True):
            torch.testing.assert_close(one.double(), other.grad, rtol=1e-5, atol=1e-5)


def test_same_bits_at_every_run() -> None:
    cell = pair()[0]
    found = [torch.autograd.grad(walk(cell, data_of(cell)), list(cell.parameters())) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"h0": torch.zeros(1, BATCH, HIDDEN + 1)},
        {"out": torch.zeros(1, BATCH, HIDDEN + 1)},
        {"gates": torch.zeros(1)},
        {"cells": torch.zeros(BATCH, 1, 16, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_malformed_calls_of_the_extension(change: dict[str, Tensor]) -> None:
    weights = [torch.zeros(4 * HIDDEN, INPUTS), torch.zeros(4 * HIDDEN, HIDDEN)]
    zeros = torch.zeros(1, BATCH, HIDDEN)
    given: dict[str, Any] = {"input": torch.zeros(1, BATCH, INPUTS), "h0": zeros, "c0": zeros, "weights": weights}
    out, _, _, gates, cells = extension.forward["cpu"](given["input"], None, zeros, zeros, weights, True)
    given |= {"out": out, "gates": gates, "cells": cells} | change
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        extension.step_backward(zeros, None, None, *given.values(), True)


def test_more_than_a_step_is_refused_by_the_extension() -> None:
    weights = [torch.zeros(4 * HIDDEN, INPUTS), torch.zeros(4 * HIDDEN, HIDDEN)]
    x, zeros = torch.zeros(2, BATCH, INPUTS), torch.zeros(1, BATCH, HIDDEN)
    out, _, _, gates, cells = extension.forward["cpu"](x, None, zeros, zeros, weights, True)
    with pytest.raises(ValueError, match="got 2 steps in 1 directions, expected one padded step"):
        extension.step_backward(None, None, None, x, zeros, zeros, weights, out, gates, cells, True)
