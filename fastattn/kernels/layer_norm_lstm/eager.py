"""The eager definition behind the operators: for compilers, on dtypes and devices that have no kernel.

Its gradient computes the layer again. Calls outside a compiler do without it: autograd records the definition itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.layer_norm_lstm import autograd


def layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *problem, _, all_cells = args
    out, cells, h_n, c_n = autograd.definition["layer"](*problem)
    if not all_cells:
        cells = out.new_empty(0)
    # The states of a layer without a step are its inputs, and an operator returns no input.
    h0, c0 = problem[2:4]
    h_n, c_n = (new.clone() if new is old else new.contiguous() for new, old in ((h_n, h0), (c_n, c0)))
    return out.contiguous(), cells.contiguous(), h_n, c_n, out.new_empty(0, dtype=torch.float32)


def layer_backward(
    grad_out: Tensor | None, grad_cells: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, out: Tensor,
    saved: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    *problem, input_grad = rest
    input, _, h0, c0, weights, *_ = problem
    given = (input, h0, c0, *weights)
    # An operator runs below autograd; this one needs it, and leaves no graph.
    with torch.no_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        grads = autograd.derivatives(problem, leaves, (grad_out, grad_cells, grad_h_n, grad_c_n))
    found = [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) if grad is None else grad.contiguous()
        for tensor, grad in zip(given, grads, strict=True)
    ]
    return found[0] if input_grad else input.new_empty(0), found[1], found[2], found[3:]
