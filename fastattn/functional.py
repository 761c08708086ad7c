"""The public functions: what they mean, their checks, and the call to the backend that serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import (
    double_backward,  # noqa: F401  double_backward registers itself
    plain_call,
    reference,
    sdpa,
    validation,
)
from fastattn.dispatch import Backend, Explanation, Request, choose, tiny
from fastattn.dispatch import explain as explain_request
from fastattn.kernels.attention import op  # noqa: F401  registers torch.ops.fastattn


class _Problem(NamedTuple):
    """A checked call: query (B, H, L, D), masks in four and two dimensions, the band of the causal mask and window."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    dropout_p: float
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    shift: int
    segment_query: Tensor | None
    segment_key: Tensor | None
    sinks: Tensor | None
    lower: int | None
    upper: int | None
    batch_shape: torch.Size
    request: Request


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | Sequence[Tensor] | None = None,
    causal_alignment: str = "top-left",
    need_weights: bool = False,
    average_weights: bool = True,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """Softmax attention (Vaswani et al. 2017, equation 1); the first eight arguments as torch's function of that name.

        O_i = sum_j W_ij v_j,   W_ij = keep_ij / (1 - dropout_p) * exp(S_ij - LSE_i)
        LSE_i = log(exp sink + sum_j exp S_ij)
        S_ij = cap(scale * <q_i, k_j>) + attn_mask_ij + key_padding_mask_j - slope |i - j|

    Args:
        query: (B, H, L, D), float16, bfloat16, float32 or float64. Two, three or more than four dimensions are
            taken as torch takes them: leading dimensions are batches.
        key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv); Hkv = H, or a divisor of H with ``enable_gqa``.
        attn_mask: broadcastable to (B, H, L, S); boolean, True takes part, or floating, added to the scores and
            differentiable. It is never expanded in memory. It may stand beside ``is_causal`` and ``key_padding_mask``.
        dropout_p: probability of dropping a weight, applied whenever it is > 0, as torch's function does.
        is_causal: query i sees keys j <= i ("top-left"), or j <= i + S - L with ``causal_alignment="bottom-right"``.
        scale: factor on the scores; None is 1 / sqrt(D).
        enable_gqa: allow fewer key heads than query heads, each serving H / Hkv neighbouring query heads.
        key_padding_mask: (B, S), boolean, True takes part, or floating. Whole tiles of padding are skipped.
        window: (left, right), keys further than that before or after the query's position are masked; None or -1
            leaves a side open. The position is shifted by S - L with ``causal_alignment="bottom-right"``.
        softcap: cap(x) = softcap * tanh(x / softcap) (Gemma 2, section 2), before any mask is added; None is no cap.
        alibi_slopes: (H) or (B, H), constants: the score falls by slope times the distance between the key and the
            query's position, shifted as for ``window`` (Press et al. 2021).
        sinks: (H), a logit per head that takes part in the softmax and has no value; differentiable (gpt-oss).
        segment_ids: (B, L) integers, or a pair (B, L), (B, S): a query sees the keys of its own segment only, for
            several documents packed into one row. Tiles of other segments are skipped.
        need_weights: also return the weights W, averaged over the heads (B, L, S), or (B, H, L, S) with
            ``average_weights=False``.
        return_lse: also return LSE, float32 (B, H, L), differentiable.
        deterministic: accepted for other libraries' sake; the gradients are the same bits at every run either way.

    Returns:
        The output (B, H, L, Dv) in query's dtype; then, where asked for, the weights, then LSE. A query whose keys
        are all masked has output 0, weights 0, LSE -inf (with sinks: the sink) and finite gradients.

    A second derivative is computed by the eager definition, which holds the (B, H, L, S) scores: right, and slow.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        RuntimeError: a backend forced with ``fastattn.backend`` cannot serve the call.
    """
    if (
        attn_mask is None and key_padding_mask is None and window is None and softcap is None and alibi_slopes is None
        and sinks is None and segment_ids is None and type(dropout_p) is float and dropout_p == 0.0
        and need_weights is False and return_lse is False and type(average_weights) is bool and deterministic is True
    ):  # fmt: skip
        output = plain_call.attention(query, key, value, is_causal, scale, enable_gqa, causal_alignment)
        if output is not None:
            return output
    problem = _prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_padding_mask, window, softcap,
        alibi_slopes, sinks, segment_ids, causal_alignment, need_weights, average_weights, return_lse, deterministic,
    )  # fmt: skip
    backend = choose(problem.request)
    seed = _draw_seed(problem) if problem.dropout_p > 0.0 and backend is not Backend.SDPA else None
    out, lse, weights = _run(backend, problem, seed, need_weights, average_weights)
    shape = problem.batch_shape
    results = [_restore(out, shape, 2)]
    if need_weights:
        results.append(_restore(weights, shape[:-1] if average_weights else shape, 2))
    if return_lse:
        results.append(_restore(lse, shape, 1))
    return results[0] if len(results) == 1 else tuple(results)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | Sequence[Tensor] | None = None,
    causal_alignment: str = "top-left",
    need_weights: bool = False,
    average_weights: bool = True,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Explanation:
    """The backend that ``scaled_dot_product_attention`` takes for these arguments, and why not each other one.

    Takes the arguments of ``scaled_dot_product_attention`` and raises its errors; computes nothing.
    """
    problem = _prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_padding_mask, window, softcap,
        alibi_slopes, sinks, segment_ids, causal_alignment, need_weights, average_weights, return_lse, deterministic,
    )  # fmt: skip
    return explain_request(problem.request)


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, key_padding_mask: Tensor | None, window: Sequence[int | None] | None,
    softcap: float | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    segment_ids: Tensor | Sequence[Tensor] | None, causal_alignment: str, need_weights: bool, average_weights: bool,
    return_lse: bool, deterministic: bool,
) -> _Problem:  # fmt: skip
    """Check the arguments and bring them to four dimensions."""
    validation.check_tensors(query, key, value)
    validation.check_flags(
        is_causal=is_causal, enable_gqa=enable_gqa, need_weights=need_weights, average_weights=average_weights,
        return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
    batch_shape = query.shape[:-2]
    if query.dim() != 4:
        query, key, value = (_four_dimensions(tensor) for tensor in (query, key, value))
        if attn_mask is not None and len(batch_shape) != 2 and isinstance(attn_mask, Tensor):
            attn_mask = _four_dimensional_mask(attn_mask, batch_shape, query, key)
    validation.check_shapes(query, key, value, enable_gqa)
    dropout_p = validation.check_dropout(dropout_p)
    scale = validation.check_scale(scale, query.shape[-1])
    left, right = validation.check_window(window)
    validation.check_causal_alignment(causal_alignment)
    cap = validation.check_softcap(softcap)
    if alibi_slopes is not None:
        alibi_slopes = validation.check_alibi_slopes(alibi_slopes, query)
    if sinks is not None:
        sinks = validation.check_sinks(sinks, query)
    segment_query, segment_key = validation.check_segment_ids(segment_ids, query, key)
    if attn_mask is not None:
        attn_mask = validation.check_attn_mask(attn_mask, query, key)
    if key_padding_mask is not None:
        validation.check_key_padding_mask(key_padding_mask, query, key)
    device_type = query.device.type
    if validation.autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if is_causal:
        right = 0 if right is None else min(right, 0)
    top_left = causal_alignment == "top-left"
    shift = 0 if top_left else key.shape[2] - query.shape[2]
    compiling = torch.compiler.is_compiling()
    request = Request(
        device_type=device_type,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        need_weights=need_weights,
        return_lse=return_lse,
        dropout=dropout_p > 0.0,
        band=left is not None or (right is not None and not (right == 0 and top_left)),
        attn_mask=None if attn_mask is None else attn_mask.dtype,
        padding=None if key_padding_mask is None else key_padding_mask.dtype,
        softcap=cap > 0.0,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        segments=segment_query is not None,
        compiling=compiling,
        tiny=not compiling and _gradients(query, key, value) and tiny(query, key),
    )
    return _Problem(
        query, key, value, attn_mask, key_padding_mask, dropout_p, scale, cap, alibi_slopes, shift, segment_query,
        segment_key, sinks, None if left is None else shift - left, None if right is None else shift + right,
        batch_shape, request,
    )  # fmt: skip


def _gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _run(
    backend: Backend, problem: _Problem, seed: Tensor | None, need_weights: bool, average: bool
) -> tuple[Tensor, Any, Any]:
    """Output, LSE and weights; the last two may be None where they were not asked for."""
    masks: dict[str, Any] = {
        "attn_mask": problem.attn_mask,
        "key_padding_mask": problem.key_padding_mask,
        "lower": problem.lower,
        "upper": problem.upper,
        "dropout_p": problem.dropout_p,
        "scale": problem.scale,
    }
    tensors = (problem.query, problem.key, problem.value)
    if backend is Backend.SDPA:
        return sdpa.attention(*tensors, **masks), None, None
    if backend is Backend.REFERENCE:
        masks |= {
            "softcap": problem.softcap, "alibi_slopes": problem.alibi_slopes, "shift": problem.shift,
            "segment_query": problem.segment_query, "segment_key": problem.segment_key, "sinks": problem.sinks,
        }  # fmt: skip
        out, lse, per_head = reference.attention(*tensors, seed=seed, **masks)
        if not need_weights:
            return out, lse, None
        return out, lse, (per_head.mean(1) if average else per_head).to(out.dtype)
    ops = torch.ops.fastattn
    arguments = (
        problem.attn_mask, problem.key_padding_mask, problem.alibi_slopes, problem.segment_query, problem.segment_key,
        seed, problem.dropout_p, problem.scale, problem.softcap, problem.shift, problem.lower, problem.upper,
    )  # fmt: skip
    # One pass where the backend has the probabilities at hand; two operators where a compiler may drop the second.
    sinks, name = problem.sinks, backend.value
    if need_weights and backend is Backend.CPU and not problem.request.compiling:
        out, logsumexp, weights = ops.attention_with_weights(*tensors, sinks, *arguments, average, name)
        return out, logsumexp[0], weights
    out, logsumexp = ops.attention(*tensors, sinks, *arguments, name)
    weights = None
    if need_weights:
        weights = ops.attention_weights(problem.query, problem.key, logsumexp, *arguments, average, name)
    return out, logsumexp[0], weights


def _draw_seed(problem: _Problem) -> Tensor:
    """A seed from torch's generator of that device: reproducible under manual_seed, fresh at each CUDA-graph replay."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=problem.query.device)


def _four_dimensions(tensor: Tensor) -> Tensor:
    """(..., L, D) as (B, H, L, D): missing dimensions are 1, those in excess are one batch."""
    if tensor.dim() < 4:
        return tensor[(None,) * (4 - tensor.dim())]
    return tensor.flatten(0, -4)


def _four_dimensional_mask(mask: Tensor, batch_shape: torch.Size, query: Tensor, key: Tensor) -> Tensor:
    """A mask for inputs whose batch dimensions are ``batch_shape``, for their four-dimensional form."""
    if len(batch_shape) < 2 or mask.dim() <= 3:
        return mask
    target = (*batch_shape, query.shape[2], key.shape[2])
    pairs = zip(reversed(mask.shape), reversed(target), strict=False)
    if mask.dim() > len(target) or any(got != 1 and got != wanted for got, wanted in pairs):
        raise ValueError(f"attn_mask: got shape {tuple(mask.shape)}, expected broadcastable to {tuple(target)}")
    return mask.expand(*batch_shape[:-1], *((1,) * (4 - mask.dim()) + mask.shape)[-3:]).flatten(0, -4)


def _restore(tensor: Tensor, batch_shape: torch.Size, own: int) -> Tensor:
    """Give the dimensions before the last ``own`` ones the shape the caller's query had."""
    if tensor.dim() - own == len(batch_shape):
        return tensor
    return tensor.reshape(*batch_shape, *tensor.shape[tensor.dim() - own :])
