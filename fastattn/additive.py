"""Additive attention: what it means, its checks, and the call to the backend that serves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import additive_validation as checks
from fastattn import dispatch, reference_additive, transforms, validation
from fastattn.dispatch import Backend
from fastattn.kernels.additive import extension, launch, op

op.eager_scores["scores"] = reference_additive.scores


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    coverage: Tensor | None = None,
    coverage_weight: Tensor | None = None,
    need_weights: bool = False,
) -> Any:
    """Additive attention (Bahdanau, Cho and Bengio 2015, section A.1.2) of projected queries and keys.

        e_ij = sum_d weight_d tanh(query_id + key_jd + coverage_ij coverage_weight_d) + attn_mask_ij + key_padding_j
        a_ij = exp(e_ij) / sum_j exp(e_ij),   out_i = sum_j a_ij value_j

    The paper's affine maps come before: query = W_a s, key = U_a h, weight = v_a; ``AdditiveAttention`` is the module
    that has them. The coverage term is equation 11 of See, Liu and Manning 2017 ("Get To The Point").

    The (B, Tq, Tk, D) tensor of tanh is never held: the scores and their gradients are computed tile by tile, the
    gradients from tanh computed again. Memory is that of the scores (B, Tq, Tk).

    Args:
        query: (B, Tq, D), float16, bfloat16, float32 or float64; the arithmetic is float32, or float64 for float64.
        key: (B, Tk, D).
        value: (B, Tk, Dv), what is averaged.
        weight: (D). query, key, value, weight and coverage_weight have one dtype, unless autocast casts them.
        attn_mask: broadcastable to (B, Tq, Tk); boolean, True takes part, or floating, added to the scores and
            differentiable.
        key_padding_mask: (B, Tk), boolean, True takes part, or floating. Tiles of keys past the last one that takes
            part in a boolean mask are skipped.
        coverage: (B, Tk), or (B, Tq, Tk): how much attention each key has had. Any floating dtype, which it keeps
            under autocast, as masks do. Differentiable.
        coverage_weight: (D), given with ``coverage`` or not at all.
        need_weights: also return the weights.

    Returns:
        The output (B, Tq, Dv) in query's dtype; with ``need_weights`` a pair of it and the weights (B, Tq, Tk) in the
        same dtype, differentiable. A query whose keys are all masked has output 0, weights 0 and finite gradients.

    Backends, for ``fastattn.backend``: "triton", our Triton kernels; "cpu", our C++ kernels, on CPU tensors;
    "reference", the eager definition, which holds the (B, Tq, Tk, D) tensor. Without one, the C++ kernels on the CPU
    and the Triton kernels where they are verified. Else, and for float64 on the CPU, tiles in plain PyTorch, which run
    on every device. A second derivative is the eager one.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        RuntimeError: a backend forced with ``fastattn.backend`` cannot serve the call.
    """
    checks.check_inputs(query, key, value, weight)
    checks.check_masks(attn_mask, key_padding_mask, query, key)
    coverage = checks.check_coverage(coverage, coverage_weight, query, key)
    validation.check_flags(need_weights=need_weights)
    dtype = checks.autocast_dtype(query)
    if dtype is not None and query.dtype != torch.float64:
        query, key, value, weight = (tensor.to(dtype) for tensor in (query, key, value, weight))
        coverage_weight = None if coverage_weight is None else coverage_weight.to(dtype)
    masks = [] if attn_mask is None else [attn_mask]
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        masks.append(key_padding_mask.unsqueeze(1))
        key_padding_mask = None
    inputs = (query, key, weight, coverage, coverage_weight, key_padding_mask)
    name = _choose(query)
    operator = torch.ops.fastattn.additive_scores
    scores = reference_additive.scores(*inputs) if name is None else operator(*inputs, name)
    out, weights = reference_additive.attend(scores, value, masks, padded=key_padding_mask is not None)
    return (out, weights) if need_weights else out


def _choose(query: Tensor) -> str | None:
    """The operator's backend, "triton", "cpu" or "tiled"; None for the eager definition."""
    forced, device_type = dispatch.forced_backend(), query.device.type
    if forced is Backend.REFERENCE or (forced is None and transforms.transformed()):
        return None
    on_cpu = "tiled" if extension.why_not(device_type, query.dtype) else "cpu"
    if forced is None:
        able = launch.verified(device_type) and launch.why_not(device_type, query.dtype) is None
        return "triton" if able else on_cpu
    reason = None
    if transforms.transformed():
        reason = transforms.REASON
    elif forced is Backend.TRITON:
        reason = launch.why_not(device_type, query.dtype)
    elif forced is not Backend.CPU:
        reason = "torch has no fused additive attention"
    elif device_type != "cpu":
        reason = f"device {device_type}; the path of this backend runs on the CPU"
    if reason is not None:
        raise RuntimeError(f'fastattn.backend("{forced}") cannot serve this call: {reason}')
    return "triton" if forced is Backend.TRITON else on_cpu
