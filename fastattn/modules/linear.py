"""The projections of the modules: torch's, or in inference on the CPU the extension's where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import transforms
from fastattn.kernels import onlookers
from fastattn.kernels.attention import extension

# Bound at import: a program may rebind torch.nn.functional's.
_linear = torch.nn.functional.linear

# Rows from which the extension's own products can pay, see csrc/split.cpp and csrc/panels.cpp.
_LEAST_ROWS = 512


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) weight (N, K)^T + bias (N), as torch.nn.functional.linear.

    Without gradients, float32 on the CPU, from 512 rows on: products on the bfloat16 tiles of AMX where the processor
    has them, in float32's error (csrc/split_cpu.h), and on AVX-512 processors of AMD products of the extension's own
    (csrc/panels_cpu.h), for torch's use AVX2 there.
    """
    # First, for a compiler or tracer would hold the sizes that it sees compared against.
    if onlookers.present(x, weight, *(() if bias is None else (bias,))):
        return _linear(x, weight, bias)
    many = x.dim() > 1 and x.numel() >= _LEAST_ROWS * max(x.shape[-1], 1)
    if many and extension.has_own_products() and _fits(x, weight, bias) and _plain(x, weight, bias):
        return extension.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the shapes are a linear layer's; torch says what is wrong with others, or broadcasts them."""
    return weight.dim() == 2 and weight.shape[1] == x.shape[-1] and (bias is None or bias.shape == weight.shape[:1])


def _plain(*given: Tensor | None) -> bool:
    """Whether these are float32 on the CPU, and nothing but their product is asked for."""
    tensors = [tensor for tensor in given if tensor is not None]
    return (
        all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.layout is torch.strided for tensor in tensors)
        and not any(tensor.is_neg() or tensor._is_zerotensor() for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_torch_function_mode_enabled()
        and not transforms.transformed()
    )
