"""Inputs with gradients and losses of them, for the tests of the LSTM's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import testing_lstm
from fastattn.testing_lstm import Inputs, LstmCase


def leaves_of(case: LstmCase, dtype: torch.dtype = torch.float32) -> tuple[Inputs, list[Tensor]]:
    """The inputs of a case, and the list of those that all require a gradient: input, h0, c0 and the weights."""
    inputs = testing_lstm.make_inputs(case).map(lambda tensor: tensor.to(dtype))
    return inputs, [tensor.requires_grad_() for tensor in (inputs.input, inputs.h0, inputs.c0, *inputs.weights)]


def loss_of(inputs: Inputs, results: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(x * grad).sum() for x, grad in zip(results, inputs.grads, strict=True)]).sum()


def penalty(call: testing_lstm.Call, case: LstmCase, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of a norm of gradients."""
    inputs, leaves = leaves_of(case, dtype)
    first = torch.autograd.grad(loss_of(inputs, call(inputs)), leaves, create_graph=True)
    return list(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
