"""The graph of steps that share their weights, among all that one may do with a graph: it comes and goes as torch's."""

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
from lstm_steps_cases import BATCH, HIDDEN, STEPS, Cell, assert_same, data, data_of, interrupt, pair, walk
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fastattn.kernels.lstm import extension, steps

pytestmark = pytest.mark.skipif(extension.why_unavailable("cpu") is not None, reason="needs the C++ extension")


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
    for _ in range(3):
        walk(theirs, data_of(theirs)).backward()
        loss = walk(ours, data_of(ours))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        assert_same(ours, theirs)


def test_an_input_changed_during_the_backward_is_refused() -> None:
    cell, x = pair()[0], [step.clone() for step in data()]
    first = cell(x[0])
    second = cell(x[1], first)

    def change(_: Tensor) -> None:
        x[1].zero_()

    first[0].register_hook(change)
    with pytest.raises(RuntimeError, match="modified by an inplace operation during the backward"):
        second[0].sum().backward()


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
    shared = weakref.ref(steps._in_use[key])
    loss.backward()
    assert key not in steps._in_use  # steps to come have another node
    weight = weakref.ref(cell.weight_ih)
    del loss, cell
    gc.collect()
    assert shared() is None
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
