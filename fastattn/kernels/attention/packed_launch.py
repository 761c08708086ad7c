"""Launching the Triton kernels for sequences packed one behind another; nothing is read from the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.kernels.attention import arguments, launch


def packed_attention(query: Tensor, key: Tensor, value: Tensor, *sequences: Any) -> tuple[Tensor, Tensor]:
    """See ``packed_op``."""
    query, key, value = map(_one_batch, (query, key, value))
    out, logsumexp = launch.forward_pass(query, key, value, None, _packed_problem(query, key, *sequences))
    return out[0].transpose(0, 1), logsumexp[:, 0]


def packed_attention_backward(
    grad_out: Tensor | None, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    logsumexp: Tensor, *sequences: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``packed_op``."""
    query, key, value, out = map(_one_batch, (query, key, value, out))
    dout = None if grad_out is None else _one_batch(grad_out)
    dlogsumexp = None if grad_logsumexp is None else grad_logsumexp[:, None]
    shared = _packed_problem(query, key, *sequences)
    grads = launch.backward_pass(dout, dlogsumexp, query, key, value, out, logsumexp[:, None], shared, [])
    dquery, dkey, dvalue = (grad[0].transpose(0, 1) for grad in grads)
    return dquery, dkey, dvalue


def _one_batch(packed: Tensor) -> Tensor:
    """(1, H, T, D) of (T, H, D)."""
    return packed.transpose(0, 1)[None]


def _packed_problem(
    query: Tensor, key: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None, max_q: int, max_k: int,
    scale: float, left: int | None, right: int | None,
) -> launch.Problem:  # fmt: skip
    used = None if seqused_k is None else seqused_k.contiguous()
    rows, columns = query.shape[2], key.shape[2]
    packed = arguments.Packed(cu_seq_q.contiguous(), cu_seq_k.contiguous(), used)
    sequences = cu_seq_q.shape[0] - 1, min(max_q, rows), min(max_k, columns)
    lower = None if left is None else -left
    return launch.Problem(
        query, key, None, None, None, None, None, None, 0.0, scale, 0.0, 0, lower, right, packed, sequences
    )  # fmt: skip
