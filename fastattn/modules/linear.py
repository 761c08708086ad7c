"""The projections of the modules: torch's, or for float32 on the CPU the extension's where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import transforms
from fastattn.kernels import definition, onlookers
from fastattn.kernels.attention import extension

# Bound at import: a program may rebind torch.nn.functional's.
_linear = torch.nn.functional.linear

# Multiplications from which a node of Python costs less than the products gain: 40 us of torch's on two cores.
_WORTH_A_NODE = 1 << 22


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) weight (N, K)^T + bias (N), as torch.nn.functional.linear, with its derivatives of any order.

    float32 on the CPU: products on the bfloat16 tiles of AMX where the processor has them, in float32's error
    (csrc/split_cpu.h), and on AVX-512 processors of AMD products of the extension's own (csrc/panels_cpu.h), for
    torch's use AVX2 there. Those of the gradients too.
    """
    # First, for a compiler or tracer would hold the sizes that it sees compared against.
    if onlookers.present(x, weight, *(() if bias is None else (bias,))):
        return _linear(x, weight, bias)
    rows = x.numel() // max(x.shape[-1], 1) if x.dim() > 1 else 0
    if rows >= extension.least_rows() and _fits(x, weight, bias) and _plain(x, weight, bias):
        if not _needs_grad(x, weight, bias):
            return extension.linear(x, weight, bias)
        if rows * weight.numel() >= _WORTH_A_NODE:
            return _with_gradients(x, weight, bias)
    return _linear(x, weight, bias)


class _WithGradients(torch.autograd.Function):
    """dx = g W, dW = g^T x, db = the sum of g over its rows, for the gradient g of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # No more than torch's node keeps: a frozen weight's input may be changed in place, or freed.
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.shape, ctx.columns = x.shape, weight.shape[0]
        return extension.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # Only torch's operators follow a derivative of this one, a batch of gradients, or a subclass.
        mm = torch.mm if definition.asked_for(grad) or onlookers.present(grad) else extension.mm
        rows = grad.reshape(-1, ctx.columns)
        return (
            mm(rows, weight).view(ctx.shape) if of_x else None,
            mm(rows.t(), x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


_with_gradients: Callable[..., Tensor] = _WithGradients.apply


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the shapes are a linear layer's; torch says what is wrong with others, or broadcasts them."""
    return weight.dim() == 2 and weight.shape[1] == x.shape[-1] and (bias is None or bias.shape == weight.shape[:1])


def _plain(*given: Tensor | None) -> bool:
    """Whether these are float32 on the CPU, and nothing but their product and its derivatives is asked for."""
    tensors = [tensor for tensor in given if tensor is not None]
    return (
        all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.layout is torch.strided for tensor in tensors)
        and not any(tensor.is_neg() or tensor._is_zerotensor() for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_torch_function_mode_enabled()
        and not transforms.transformed()
    )


def _needs_grad(*given: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
