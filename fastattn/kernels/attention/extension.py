"""The C++ attention of ``csrc`` behind the operators: float32, float16 and bfloat16 on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.built import UNAVAILABLE as UNAVAILABLE
from fastattn.kernels.built import extension as _extension


def instruction_sets() -> list[str]:
    """The instruction sets the kernels are compiled for and this processor has, the one in use by default first."""
    names: list[str] = _extension.instruction_sets()
    return names


def use_instruction_set(name: str) -> None:
    """Make later calls use one of ``instruction_sets()``, for tests and measurements.

    Raises ValueError for another name.
    """
    if not _extension.use_instruction_set(name):
        raise ValueError(f"instruction set: got {name!r}, this processor has {', '.join(instruction_sets())}")


def least_rows() -> int:
    """Rows of the left operand from which ``mm`` and ``linear`` can be faster than torch's; sys.maxsize: never."""
    return int(_extension.least_rows_of_own_products()) if UNAVAILABLE is None else sys.maxsize


# left (M, K), right (K, N) -> their product, by the fastest way there is.
mm: Any = getattr(_extension, "mm", torch.mm)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) weight (N, K)^T + bias (N), float32 without gradients; torch's product unless ours is faster."""
    rows = x.reshape(-1, x.shape[-1])
    product: Tensor
    product = mm(rows, weight.t()) if bias is None else _extension.linear(rows, weight, bias)
    # A view made without gradients could not be changed in place with them later.
    return product if x.dim() == 2 else torch.ops.aten._unsafe_view(product, [*x.shape[:-1], weight.shape[0]])


# What the operators of ``op`` call. The extension takes the arguments that all of them share as one tuple, in the order
# of ``op``; on the CPU it reads the seed without a synchronisation.
_NO_WEIGHTS, _MEAN, _PER_HEAD = 0, 1, 2


def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor]:
    out, logsumexp, _ = _extension.attention_forward(query, key, value, sinks, problem, _NO_WEIGHTS)
    return out, logsumexp


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *problem, average = rest
    mode = _MEAN if average else _PER_HEAD
    result: tuple[Tensor, Tensor, Tensor] = _extension.attention_forward(query, key, value, sinks, problem, mode)
    return result


def attention_backward(
    grad_out: Tensor | None, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    *problem, attn_mask_grad, padding_grad = rest
    result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = _extension.attention_backward(
        grad_out, grad_logsumexp, query, key, value, out, logsumexp, problem, attn_mask_grad, padding_grad
    )
    return result


def attention_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> Tensor:
    *problem, average = rest
    result: Tensor = _extension.attention_weights(query, key, logsumexp, problem, average)
    return result


def attention_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *problem, average, attn_mask_grad, padding_grad = rest
    result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = _extension.attention_weights_backward(
        grad_weights, query, key, logsumexp, problem, average, attn_mask_grad, padding_grad
    )
    return result


def packed_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Of ``fastattn::packed_attention``, without its backend."""
    result: tuple[Tensor, Tensor] = _extension.packed_attention(*args)
    return result


def packed_attention_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``fastattn::packed_attention_backward``, without its backend."""
    result: tuple[Tensor, Tensor, Tensor] = _extension.packed_attention_backward(*args)
    return result


def kv_cache_append(*args: Any) -> None:
    """key_cache, value_cache, new_key, new_value, cache_lengths, block_table of ``fastattn::kv_cache_append``."""
    _extension.kv_cache_append(*args)


def kv_cache_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE; arguments as ``fastattn::kv_cache_attention`` up to ``appended``, without ``num_splits``."""
    result: tuple[Tensor, Tensor] = _extension.kv_cache_attention(*args)
    return result
