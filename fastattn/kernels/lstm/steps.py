"""Steps that share their weights: one product a backward for each gradient of the weights, not one a step.

The gradient of W_ih is the sum over the steps of dG_t^T x_t, with dG_t the gradient of a step's sums (csrc/lstm.h). A
node for each step that returned its own term would write, and autograd add up, a matrix as large as the weights in
every step. So a step hands (dG_t, x_t, h_{t-1}) to a node that all steps of a graph share, and that autograd reaches
when the last of them is done; it takes [dG_1; dG_2; ...]^T [x_1; x_2; ...], many rows at a time. A layer called with
more steps than one does the same inside the extension.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.attention.extension import mm
from fastattn.kernels.lstm import autograd, extension

# Rows whose part in the gradients of the weights is taken at a time: what waits for it stays small beside the weights,
# and writing the gradients once more costs little beside the product of so many rows.
_ROWS = 1024


class _Pending:
    """What the steps of one backward have left so far: the gradients of W_ih, W_hh, b, and rows not yet among them."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # dG (B, 4H), x (B, I), h (B, H)
        self.versions: list[tuple[int, int]] = []  # of x and h
        self.waiting = 0
        self.sums: list[Tensor] = []

    def add(self, dsums: Tensor, input: Tensor, hidden: Tensor) -> None:
        self.rows.append((dsums, input, hidden))
        self.versions.append((input._version, hidden._version))
        self.waiting += dsums.shape[0]
        if self.waiting >= _ROWS:
            self.take()

    def take(self) -> None:
        """Make the rows that wait a part of the gradients."""
        if not self.rows:
            return
        if [(input._version, hidden._version) for _, input, hidden in self.rows] != self.versions:
            raise RuntimeError(
                "LSTM: an input or a state of a step has been modified by an inplace operation during the backward, "
                "before the gradients of the weights were computed from it"
            )
        dsums, inputs, hidden = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        turned = dsums.t()
        more = [mm(turned, inputs.to(dsums.dtype)), mm(turned, hidden.to(dsums.dtype)), dsums.sum(0)]
        if self.sums:
            for total, part in zip(self.sums, more, strict=True):
                total += part
        else:
            self.sums = [part.float() for part in more]
        self.rows, self.versions, self.waiting = [], [], 0


class _Shared:
    """The node that takes the gradients of some weights: ``token`` is its result, an argument of every step."""

    def __init__(self, key: _Key, weights: Sequence[Tensor]) -> None:
        self.pending: dict[int, _Pending] = {}  # by the number that autograd gives a backward
        self.token = _weight_gradients(key, self.pending, *weights)
        self.ends: tuple[Any, ...] = _next(self.token)[-len(weights) :]

    def takes(self, step: Tensor) -> bool:
        """Whether the weights' gradients go from here to the nodes to which ``step``, a step's result, would send them.

        A weight whose data were replaced (``module.half().float()``) has another node for its gradient since.
        """
        nodes = zip(self.ends, _next(step)[-len(self.ends) :], strict=True)
        return all(one[0] is other[0] for one, other in nodes)


# Those that steps to come may share, by weights. The node of a step keeps its entry alive.
_Key = tuple[tuple[int, bool], ...]
_in_use: weakref.WeakValueDictionary[_Key, _Shared] = weakref.WeakValueDictionary()


def serve(input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether ``step`` takes this layer: one padded step, one direction, no projection, gradients of leaves wanted."""
    return (
        batch_sizes is None
        and input.shape[0] == h0.shape[0] == 1
        and h0.shape == c0.shape
        and serve_cell(weights)
    )


def serve_cell(weights: Sequence[Tensor]) -> bool:
    """Whether ``step`` takes a cell with these weights."""
    return any(weight.requires_grad for weight in weights) and all(weight.is_leaf for weight in weights)


def step(input: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """out, h_n and c_n of a layer, h_1 and c_1 of a cell, by the extension on the CPU.

    One of the two above is true for it.
    """
    key = tuple((id(weight), weight.requires_grad) for weight in weights)
    shared = _in_use.get(key)
    if shared is not None:
        results = _step(shared, shared.token, input, h0, c0, *weights)
        if shared.takes(results[0]):
            return results
    shared = _in_use[key] = _Shared(key, weights)
    return _step(shared, shared.token, input, h0, c0, *weights)


class _WeightGradients(torch.autograd.Function):
    """Nothing forward; backward the gradients of the weights, of all steps before."""

    @staticmethod
    def forward(ctx: Any, key: _Key, pending: dict[int, _Pending], *weights: Tensor) -> Tensor:
        ctx.key, ctx.pending = key, pending
        ctx.dtype, ctx.shapes = weights[0].dtype, [weight.shape for weight in weights]
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        # Steps to come get a node of their own: compiled autograd refuses one that a backward has run through.
        shared = _in_use.get(ctx.key)
        if shared is not None and shared.pending is ctx.pending:
            _in_use.pop(ctx.key, None)
        pending = ctx.pending.pop(torch._C._current_graph_task_id(), None)
        if pending is None:
            return None, None, *(torch.zeros(shape, dtype=ctx.dtype) if _compiled() else None for shape in ctx.shapes)
        pending.take()
        of_x, of_h, of_bias = (total.to(ctx.dtype) for total in pending.sums)
        needed = ctx.needs_input_grad[2:]
        found = (of_x, of_h, of_bias, of_bias.clone() if len(needed) > 2 else None)
        return None, None, *(gradient if need else None for gradient, need in zip(found, needed, strict=False))


class _Step(torch.autograd.Function):
    """One step of the extension: a layer's, input (1, B, I) and states (1, B, H), or a cell's, (B, I) and (B, H)."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, token: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = inputs
        if _of_a_cell(input):
            *results, gates, cells = extension.cell_forward(input, h0, c0, weights, True)
        else:
            *results, gates, cells = extension.forward["cpu"](input, None, h0, c0, weights, True)
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, cells, input, h0, c0, *weights)  # no result: all may be changed in place
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gates, cells, input, h0, c0, *weights = ctx.saved_tensors
        needed, cell = ctx.needs_input_grad[2:], _of_a_cell(input)
        if cell:
            grads = (None, *grads)
        if _compiled() or not autograd.extension_serves(grads):
            if cell:
                input, h0, c0 = _as_layer((input, h0, c0))
                grads = _as_layer(grads)
            saved = (torch.empty_like(h0), gates, cells)  # the outputs of one step have no part in its backward
            found = autograd.past_extension("cpu", (input, h0, c0, *weights), needed, None, saved, grads)
            return None, gates.new_zeros(0), *(_as_cell(found[:3]) if cell else found[:3]), *found[3:]
        dinput, dh0, dc0, dsums = extension.step_backward(*grads, input, h0, c0, weights, gates, cells, needed[0])
        if torch._C._will_engine_execute_node(ctx.shared.token.grad_fn):
            pending = ctx.shared.pending.setdefault(torch._C._current_graph_task_id(), _Pending())
            # Without their graph, which through this node would hold what holds them.
            input, h0 = input.detach(), h0.detach()
            pending.add(dsums, input if cell else input[0], h0 if cell else h0[0])
        return None, None, dinput, dh0, dc0, *(None for _ in weights)


def _of_a_cell(input: Tensor) -> bool:
    return input.dim() == 2


def _as_layer(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """A cell's tensors as those of a layer."""
    return tuple(None if tensor is None else tensor.unsqueeze(0) for tensor in tensors)


def _as_cell(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The way back."""
    return tuple(None if tensor is None else tensor.squeeze(0) for tensor in tensors)


_weight_gradients: Callable[..., Tensor] = _WeightGradients.apply
_step: Callable[..., tuple[Tensor, ...]] = _Step.apply


def _next(tensor: Tensor) -> tuple[Any, ...]:
    """The nodes to which a result's node sends gradients, each with the number of its argument."""
    node: Any = tensor.grad_fn
    nodes: tuple[Any, ...] = node.next_functions
    return nodes


def _compiled() -> bool:
    """Whether compiled autograd runs this backward: it adds up all gradients of a weight, and none may be None."""
    module: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and bool(module.in_compiled_autograd_region)
