"""Attention of packed sequences: the public function and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import validation, varlen_eager, varlen_op  # noqa: F401  varlen_op registers the operator
from fastattn.dispatch import Backend, Request, choose
from fastattn.kernels.attention import packed_op
from fastattn.varlen_checks import check_cu_seq_tensor, check_inference_only, check_longest, check_packed, check_paged


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Softmax attention within packed sequences; the arguments of ``torch.nn.attention.varlen.varlen_attn``.

    Sequence n has queries cu_seq_q[n] to cu_seq_q[n + 1] - 1 and keys cu_seq_k[n] to cu_seq_k[n + 1] - 1; either may be
    none. Its last query stands at its last key (bottom-right alignment). The formula of each sequence is
    ``scaled_dot_product_attention``'s.

    Args:
        query: (Tq, H, D), float16, bfloat16, float32 or float64.
        key, value: (Tk, Hkv, D) and (Tk, Hkv, Dv); Hkv = H, or a divisor of H with ``enable_gqa``. With
            ``block_table``, pools of pages (pages, page_size, Hkv, D) and (pages, page_size, Hkv, Dv).
        cu_seq_q, cu_seq_k: (N + 1), int32 or int64, from 0 to Tq and Tk, ascending. cu_seq_k is not read where
            ``seqused_k`` and ``block_table`` are given, and may then be None.
        max_q, max_k: at least the lengths of the longest sequence of queries and of keys.
        return_aux: None, or an object whose ``lse`` says whether LSE is returned too, such as torch's ``AuxRequest``.
        scale: factor on the scores; None is 1 / sqrt(D).
        window_size: (left, right), keys further than that before or after the query's position are masked; -1 leaves a
            side open: (-1, 0) is causal.
        enable_gqa: allow fewer key heads than query heads, each serving H / Hkv neighbouring query heads.
        seqused_k: (N) int32 or int64, only so many keys of each sequence take part; without gradient, as in torch.
        block_table: (N, max_pages) int32 or int64, the pages of each sequence's keys in order; needs ``seqused_k``;
            without gradient, as in torch.
        num_splits: accepted for torch's sake; a sequence's result does not depend on the others either way.

    Returns:
        The output (Tq, H, Dv) in query's dtype; then, where asked for, LSE (H, Tq), float32 (float64 for float64
        inputs), the shape torch's kernel gives. Both are differentiable. A query without a key has output 0 and
        LSE -inf.

    Our C++ kernels, and the Triton kernels where they are verified or forced, take the pack as it is; Triton's read no
    boundary on the host. With a ``block_table``, and everywhere else, sequences of one length are one dense call.
    Boundaries are read for that, which waits for a GPU; they are checked as they are read. Triton's cuts bad ones: see
    ``debug_checks``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        RuntimeError: a backend forced with ``fastattn.backend`` cannot serve the call.
    """
    check_packed(query, key, value, paged=block_table is not None, enable_gqa=enable_gqa)
    check_cu_seq_tensor("cu_seq_q", cu_seq_q, query, None)
    check_paged(query, key, cu_seq_q, cu_seq_k, seqused_k, block_table)
    check_longest(max_q=max_q, max_k=max_k)
    scale = validation.check_scale(scale, query.shape[-1])
    left, right = validation.check_window(window_size)
    if num_splits is not None and (isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1):
        raise ValueError(f"num_splits: got {num_splits!r}, expected a positive integer or None")
    if return_aux is not None and not hasattr(return_aux, "lse"):
        raise TypeError(f"return_aux: got {type(return_aux).__name__}, expected None or an object with a field lse")
    return_lse = return_aux is not None and bool(return_aux.lse)
    check_inference_only(query, key, value, seqused_k=seqused_k, block_table=block_table)
    query, key, value = _autocast(query, key, value)
    backend = _backend(query, value, return_lse)
    if cu_seq_k is not None and block_table is None and backend in (Backend.TRITON, Backend.CPU):
        out, logsumexp = torch.ops.fastattn.packed_attention(
            query, key, value, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, scale, left, right, backend.value
        )
        return (out, logsumexp[0]) if return_lse else out
    if torch.compiler.is_compiling():
        out, lse = torch.ops.fastattn.varlen_attention(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, right, seqused_k, block_table, return_lse
        )
    else:
        out, lse = varlen_eager.attend(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, right, seqused_k, block_table, return_lse
        )
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of autocast, where it is on: what the operator returns must not depend on the state inside it."""
    device_type, dtype = tensors[0].device.type, tensors[0].dtype
    if not validation.autocast_enabled(device_type):
        return tensors
    target = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(target) for tensor in tensors)


def _backend(query: Tensor, value: Tensor, return_lse: bool) -> Backend:
    """Triton's and our C++ kernels take the pack as it is."""
    return choose(
        Request(query.device.type, query.dtype, query.shape[-1], value.shape[-1], return_lse=return_lse, band=True)
    )


def _definition(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None,
    max_q: int, max_k: int, scale: float, left: int | None, right: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What ``packed_op`` computes."""
    return varlen_eager.attend(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, right, seqused_k, None, True
    )


packed_op.second_derivative["packed"] = _definition
