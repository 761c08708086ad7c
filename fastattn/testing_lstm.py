"""Inputs, oracle and error budget of the LSTM tests; imported by tests and benchmarks only.

The budget is that of ``fastattn.testing``: with e(x) = max |x - float64 oracle|, a layer passes where

    e(layer) <= k e(plain PyTorch in the same dtype) + 4 (eps |oracle| + d)      k = 2, for gradients 3

d is how far the oracle itself moves when every number that goes into it is rounded once more: what no arithmetic in
this dtype can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import reference_lstm
from fastattn.testing import assert_within_budget, largest_error

_NAMES = ("out", "h_n", "c_n")


@dataclass(frozen=True)
class LstmCase:
    """One call of one layer, or of a stack of them, with everything that can vary."""

    steps: int = 5
    batch: int = 3
    inputs: int = 7
    hidden: int = 9
    projection: int = 0
    directions: int = 1
    bias: bool = True
    lengths: tuple[int, ...] | None = None  # of a packed batch, longest first; then steps and batch follow from it
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # "transposed": batch before steps; "strided": every second number of a larger tensor
    losses: tuple[str, ...] = _NAMES
    scale: float = 1.0  # of the weights
    seed: int = 0
    layers: int = 1  # of a stack, in one direction and without projections

    @property
    def outputs(self) -> int:
        """P: features of a hidden state."""
        return self.projection or self.hidden

    @property
    def batch_sizes(self) -> Tensor | None:
        """Rows per step of a packed batch."""
        if self.lengths is None:
            return None
        return torch.tensor([sum(length > step for length in self.lengths) for step in range(max(self.lengths))])


@dataclass
class Inputs:
    """Tensors of a case; ``grads`` weigh the results in the loss."""

    input: Tensor
    batch_sizes: Tensor | None
    h0: Tensor
    c0: Tensor
    weights: list[Tensor]
    grads: tuple[Tensor, Tensor, Tensor]
    layers: int = 1

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """A copy with every floating tensor changed."""
        return Inputs(
            change(self.input), self.batch_sizes, change(self.h0), change(self.c0),
            [change(weight) for weight in self.weights], tuple(change(grad) for grad in self.grads),  # type: ignore[arg-type]
            self.layers,
        )  # fmt: skip


Call = Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]


def make_inputs(case: LstmCase, device: str = "cpu") -> Inputs:
    """Random tensors in the case's layout and dtype, the same for the same case."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        wide = [*shape[:-1], 2 * shape[-1]] if case.layout == "strided" else list(shape)
        if case.layout == "transposed" and len(shape) == 3:
            wide[:2] = wide[1::-1]
        tensor = (torch.randn(wide, generator=generator, dtype=torch.float64) * scale).to(device, case.dtype)
        if case.layout == "transposed" and len(shape) == 3:
            return tensor.transpose(0, 1)
        return tensor[..., ::2] if case.layout == "strided" else tensor

    sizes = case.batch_sizes
    batch = case.batch if case.lengths is None else len(case.lengths)
    rows = (case.steps, batch) if sizes is None else (int(sizes.sum()),)
    shapes = [(4 * case.hidden, case.outputs)]
    shapes += [(4 * case.hidden,)] * 2 if case.bias else []  # type: ignore[list-item]
    shapes += [(case.projection, case.hidden)] if case.projection else []
    scale = case.scale * case.hidden**-0.5
    features = [case.inputs] * case.directions + [case.hidden] * (case.layers - 1)
    weights = [draw(*shape, scale=scale) for read in features for shape in [(4 * case.hidden, read), *shapes]]
    state = (len(features), batch)
    grads = (draw(*rows, case.directions * case.outputs), draw(*state, case.outputs), draw(*state, case.hidden))
    return Inputs(
        draw(*rows, case.inputs), sizes, draw(*state, case.outputs), draw(*state, case.hidden), weights, grads,
        case.layers,
    )  # fmt: skip


def eager(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The eager definition in the arithmetic of the inputs' own dtype: the oracle, and plain PyTorch."""
    out, each, dtype = inputs.input, len(inputs.weights) // inputs.layers, inputs.input.dtype
    states = []
    for layer, (h0, c0) in enumerate(zip(inputs.h0.chunk(inputs.layers), inputs.c0.chunk(inputs.layers), strict=True)):
        weights = inputs.weights[layer * each : (layer + 1) * each]
        out, *state = reference_lstm.lstm_layer(out, inputs.batch_sizes, h0, c0, weights, compute_dtype=dtype)
        states.append(state)
    h_n, c_n = (torch.cat(parts) for parts in zip(*states, strict=True))
    return out, h_n, c_n


def evaluate(call: Call, case: LstmCase, inputs: Inputs) -> dict[str, Tensor]:
    """Results of a call, and the gradients of everything that goes into it."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.input, inputs.h0, inputs.c0, *inputs.weights)]
    results = call(replace(inputs, input=leaves[0], h0=leaves[1], c0=leaves[2], weights=leaves[3:]))
    named = dict(zip(_NAMES, results, strict=True))
    weighing = dict(zip(_NAMES, inputs.grads, strict=True))
    found: Any = torch.autograd.grad(
        [named[name] for name in case.losses], leaves, [weighing[name] for name in case.losses], allow_unused=True
    )
    names = ["input", "h0", "c0", *(f"weights[{place}]" for place in range(len(inputs.weights)))]
    grads = {
        "d" + name: torch.zeros_like(leaf) if grad is None else grad
        for name, leaf, grad in zip(names, leaves, found, strict=True)
    }
    return {name: tensor.detach().cpu() for name, tensor in (named | grads).items()}


def check(case: LstmCase, call: Call, device: str = "cpu") -> None:
    """Raise AssertionError where ``call`` leaves the error budget anywhere on this case."""
    exact = make_inputs(case).map(lambda tensor: tensor.double())
    oracle = evaluate(eager, case, exact)
    plain = evaluate(eager, case, make_inputs(case))
    ours = evaluate(call, case, make_inputs(case, device))
    eps = torch.finfo(case.dtype).eps
    moved = _moved(case, exact, oracle, eps)
    for name, expected in oracle.items():
        if ours[name].shape != expected.shape or ours[name].dtype != case.dtype:
            raise AssertionError(f"{name}: {ours[name].dtype} {tuple(ours[name].shape)}, expected {case}")
        if expected.numel() == 0:
            continue
        roundings = eps * float(expected.abs().max()) + moved[name]
        assert_within_budget(case, name, ours[name], expected, largest_error(plain[name], expected), roundings)


def _moved(case: LstmCase, exact: Inputs, oracle: dict[str, Tensor], eps: float) -> dict[str, float]:
    """How far each result moves when the numbers are changed by one rounding, in either direction at random."""
    generator = torch.Generator().manual_seed(case.seed + 1)

    def change(tensor: Tensor) -> Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        return tensor * (1 + eps / 2 * signs)

    results = evaluate(eager, case, exact.map(change))
    return {name: largest_error(result, oracle[name]) for name, result in results.items()}
