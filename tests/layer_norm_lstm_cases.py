"""Inputs, oracle and error budget of the layer-normalised LSTM's tests.

The budget, with e(x) = max |x - float64 oracle|: a kernel passes where

    e(kernel) <= k e(plain PyTorch in the same dtype) + 4 (r + eps max |oracle|)      k = 2, for gradients 3

The error of plain PyTorch is the largest on the inputs and on six roundings of them: where a sum cancels, as the
gradient of h0 does for few units, one of them may be right by luck. r is what these roundings, and one of the gradient
of each product W x and of each normalised value, move the oracle by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

import fastattn
from fastattn import reference_layer_norm_lstm as reference
from fastattn.testing import assert_within_budget, largest_error

NAMES = ("out", "cells", "h_n", "c_n", "input", "h0", "c0")


@dataclass(frozen=True)
class Case:
    """One call of the operator with everything that can vary."""

    steps: int = 4
    batch: int = 3
    inputs: int = 5
    hidden: int = 6
    directions: int = 1
    bias: bool = True
    packed: bool = False
    h_mask: str | None = None  # "variational", "step"
    zoneout: str | None = None  # "mask", "expectation"
    gains: float = 1.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        return ",".join(f"{name}={value}" for name, value in changed.items()).replace("torch.", "") or "plain"


def make_problem(case: Case, seed: int = 0) -> list[Any]:
    """The arguments that the operators share, the same for the same case."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def below(probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    batch_sizes, rows = None, case.steps * case.batch
    if case.packed:
        lengths = torch.randint(1, case.steps + 1, (case.batch,), generator=generator)
        lengths[0] = case.steps
        batch_sizes = (lengths > torch.arange(case.steps)[:, None]).sum(1)
        rows = int(batch_sizes.sum())
    hidden, directions = case.hidden, case.directions
    input = draw(rows, case.inputs) if case.packed else draw(case.steps, case.batch, case.inputs)
    weights = []
    for _ in range(directions):
        weights += [draw(4 * hidden, case.inputs) * case.inputs**-0.5, draw(4 * hidden, hidden) * hidden**-0.5]
        weights += [case.gains * (1.0 + 0.3 * draw(size)) for size in (4 * hidden, 4 * hidden, hidden)]
        weights += [0.5 * draw(4 * hidden), 0.3 * draw(hidden)] if case.bias else []
    h0, c0 = draw(directions, case.batch, hidden), draw(directions, case.batch, hidden)
    h_mask = None
    if case.h_mask is not None:
        h_mask = below(0.7, case.batch if case.h_mask == "variational" else rows, directions, hidden) / 0.7
    zoneout: list[Any] = [None, None, 0.0, 0.0]
    if case.zoneout == "mask":
        zoneout[:2] = below(0.3, rows, directions, hidden), below(0.2, rows, directions, hidden)
    elif case.zoneout == "expectation":
        zoneout[2:] = 0.3, 0.2
    input, h0, c0, *weights = (tensor.to(case.dtype) for tensor in (input, h0, c0, *weights))
    return [input, batch_sizes, h0, c0, weights, h_mask, *zoneout, 1e-5]


Call = Callable[..., Any]


def kernel(*problem: Any) -> Any:
    """The operator on the C++ kernel, with everything it can return."""
    return torch.ops.fastattn.layer_norm_lstm_layer(*problem, True, True, "cpu")[:4]


def plain(*problem: Any) -> Any:
    """Plain PyTorch in the arithmetic of the inputs' own dtype."""
    return reference.layer(*problem, compute_dtype=problem[0].dtype)


def moved(problem: list[Any]) -> list[Any]:
    """The same problem with each number rounded another way."""
    input, batch_sizes, h0, c0, weights, *rest = problem

    input, h0, c0, *weights = (_moved(tensor, tensor.dtype) for tensor in (input, h0, c0, *weights))
    return [input, batch_sizes, h0, c0, weights, *rest]


def _moved(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Each number moved by up to a unit in the last place of ``dtype``."""
    relative = torch.finfo(dtype).eps * (2.0 * torch.rand(tensor.shape, dtype=torch.float64) - 1.0)
    return (tensor * (1.0 + relative)).to(tensor.dtype)


def _with_moved_gradients(dtype: torch.dtype) -> Call:
    """The definition, the gradients of its products and of what it normalised moved by a rounding of ``dtype``."""

    def moving(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def moved_function(*args: Any) -> Tensor:
            result = function(*args)
            result.register_hook(lambda grad: _moved(grad, dtype))
            return result

        return moved_function

    def call(*problem: Any) -> Any:
        changed = {name: moving(getattr(functional, name)) for name in ("linear", "layer_norm")}
        with mock.patch.multiple(functional, **changed):
            return reference.layer(*problem)

    return call


def evaluate(call: Call, problem: list[Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of a weighted sum of them, inputs in ``dtype``."""
    input, batch_sizes, h0, c0, weights, *rest = problem
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (input, h0, c0, *weights)]
    results = call(leaves[0], batch_sizes, leaves[1], leaves[2], leaves[3:], *rest)
    generator = torch.Generator().manual_seed(1)
    weighed = [result.double() * torch.randn(result.shape, generator=generator) for result in results]
    grads = torch.autograd.grad(torch.stack([term.sum() for term in weighed]).sum(), leaves)
    named = dict(zip(NAMES[:4], results, strict=True))
    names = [*NAMES[4:], *(f"weights[{place}]" for place in range(len(weights)))]
    named |= {"d" + name: grad for name, grad in zip(names, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in named.items()}


def check(case: Case, call: Call = kernel) -> None:
    """Raise AssertionError where ``call`` leaves the budget anywhere on this case."""
    problem = make_problem(case)
    problems = [problem, *(moved(problem) for _ in range(6))]
    oracles = [evaluate(reference.layer, each, torch.float64) for each in problems]
    rounded = [evaluate(_with_moved_gradients(case.dtype), each, torch.float64) for each in problems]
    usual = [evaluate(plain, each, case.dtype) for each in problems]
    ours = evaluate(call, problem, case.dtype)
    eps = torch.finfo(case.dtype).eps
    for name, expected in oracles[0].items():
        assert ours[name].shape == expected.shape, name
        assert ours[name].dtype == case.dtype, name
        size = float(expected.abs().max()) if expected.numel() else 0.0
        theirs = max(largest_error(result[name], oracle[name]) for result, oracle in zip(usual, oracles, strict=True))
        roundings = max(largest_error(other[name], expected) for other in rounded) + eps * size
        assert_within_budget(case, name, ours[name], expected, theirs, roundings)


def assert_as_the_definition(module: fastattn.LayerNormLSTM, packed: PackedSequence, backend: str) -> None:
    """Outputs, states, cells and gradients of a module with noise, on ``backend`` and by the definition, alike."""
    found = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        with fastattn.backend(name):
            out, states, cells = module(packed, return_all_states=True)
        loss = out.data.square().sum() + cells.data.sin().sum() + states[0].sum()
        found.append((out.data, *states, cells.data, *torch.autograd.grad(loss, list(module.parameters()))))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))
