"""Steps that share their weights: one product a backward for each gradient of the weights, not one a step.

The gradient of W_ih is the sum over the steps of dG_t^T x_t, with dG_t the gradient of a step's sums (csrc/lstm.h). A
node for each step that returned its own term would write, and autograd add up, a matrix as large as the weights in
every step. So a step hands (dG_t, x_t, h_{t-1}) to a node that all steps of a graph share, and that autograd reaches
when the last of them is done; it takes [dG_1; dG_2; ...]^T [x_1; x_2; ...]. A layer called with more steps than one
does the same inside the extension.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels import definition
from fastattn.kernels.attention.extension import mm
from fastattn.kernels.lstm import autograd, extension
from fastattn.kernels.lstm.autograd import Results

# dG (B, 4H), x (B, I), h (B, H) of the steps that a backward has passed, by the number autograd gives the backward.
_Pending = dict[int, list[tuple[Tensor, Tensor, Tensor]]]


class _Shared:
    """The node that takes the gradients of some weights: ``token`` is its result, an argument of every step."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.pending: _Pending = {}
        self.token = _weight_gradients(self.pending, *weights)


# Those in use, by weights. The node of a step keeps its entry alive, and the entry, through the graph, the weights that
# have a gradient; so no two of these have the same id.
_in_use: weakref.WeakValueDictionary[tuple[Any, ...], _Shared] = weakref.WeakValueDictionary()


def serve(input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether ``step`` takes this call: one padded step in one direction, no projection, gradients of leaves wanted."""
    return (
        batch_sizes is None
        and input.shape[0] == h0.shape[0] == 1
        and h0.shape == c0.shape
        and any(weight.requires_grad for weight in weights)
        and all(weight.is_leaf for weight in weights)
    )


def step(input: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor]) -> Results:
    """out, h_n and c_n of a call that ``serve`` takes, by the extension on the CPU."""
    key = tuple((id(weight), weight.requires_grad, weight.dtype) for weight in weights)
    shared = _in_use.get(key)
    if shared is None:
        shared = _in_use[key] = _Shared(weights)
    return _step(shared, shared.token, input, h0, c0, *weights)


class _WeightGradients(torch.autograd.Function):
    """Nothing forward; backward the gradients of the weights, of all steps before."""

    @staticmethod
    def forward(ctx: Any, pending: _Pending, *weights: Tensor) -> Tensor:
        ctx.pending = pending
        ctx.biases = len(weights) - 2
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        steps = ctx.pending.pop(torch._C._current_graph_task_id(), None)
        if steps is None:
            return (None,) * len(ctx.needs_input_grad)
        dsums, inputs, hidden = (torch.cat(parts) for parts in zip(*steps, strict=True))
        turned = dsums.t()
        found: list[Tensor | None] = [
            mm(turned, other.to(dsums.dtype)).to(ctx.dtype) if needed else None
            for other, needed in zip((inputs, hidden), ctx.needs_input_grad[1:3], strict=True)
        ]
        if ctx.biases:
            dbias = dsums.sum(0).to(ctx.dtype)
            found += [dbias, dbias.clone()]
        return None, *found


class _Step(torch.autograd.Function):
    """One step of the extension."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, token: Tensor, *inputs: Tensor) -> Results:
        input, h0, c0, *weights = inputs
        out, h_n, c_n, gates, cells = extension.forward["cpu"](input, None, h0, c0, weights, True)
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, gates, cells, input, h0, c0, *weights)
        return out, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        out, gates, cells, *tensors = ctx.saved_tensors
        input, h0, c0, *weights = tensors
        if definition.asked_for(*grads):
            return None, None, *autograd.by_definition(tensors, ctx.needs_input_grad[2:], None, 1, grads)
        dinput, dh0, dc0, dsums = extension.step_backward(
            *grads, input, h0, c0, weights, out, gates, cells, ctx.needs_input_grad[2]
        )
        if torch._C._will_engine_execute_node(ctx.shared.token.grad_fn):
            steps = ctx.shared.pending.setdefault(torch._C._current_graph_task_id(), [])
            steps.append((dsums, input[0], h0[0]))
        return None, None, dinput, dh0, dc0, *(None for _ in weights)


_weight_gradients: Callable[..., Tensor] = _WeightGradients.apply
_step: Callable[..., Results] = _Step.apply
