"""Attention of new tokens to a cache of keys and values: the public function, its checks and its choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import kv_cache_op, transforms, validation
from fastattn.dispatch import MAX_HEAD_DIM, Backend, forced_backend
from fastattn.kernels import onlookers
from fastattn.kernels.attention import decode_launch, extension, launch

_PAGE_MULTIPLE = 16
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
) -> Any:
    """Softmax attention of the newest L tokens of each sequence to its cache, which may be grown first.

    A sequence then holds n = cache_lengths + T tokens; query i stands at position n - L + i, so that the last query is
    the newest token. The formula is ``scaled_dot_product_attention``'s, with keys j < n.

    Args:
        query: (B, H, L, D), float16, bfloat16, float32 or float64; L = 1 for a decoding step, a few for speculative
            decoding, more for a piece of a prompt.
        key_cache, value_cache: (B, Hkv, S_max, D) and (B, Hkv, S_max, Dv), H a multiple of Hkv; or, with
            ``block_table``, a pool (pages, Hkv, page_size, D) and (pages, Hkv, page_size, Dv), page_size a multiple of
            16. Any strides whose last dimension is contiguous. What they hold behind a sequence's tokens is not used.
        cache_lengths: (B,) int32 or int64, tokens of each sequence before new ones are appended. Not changed.
        new_key, new_value: (B, Hkv, T, D) and (B, Hkv, T, Dv), both or none: written into the caches at positions
            cache_lengths to cache_lengths + T, in place, before the attention.
        block_table: (B, max_pages) int32 or int64: the pages of each sequence in order. Pages a sequence does not use
            yet may be any number. Two sequences may share pages that nothing is appended to.
        is_causal: query i sees keys up to its own position.
        scale: factor on the scores; None is 1 / sqrt(D).
        window: (left, right), keys further than that before or after the query's position are masked; None or -1
            leaves a side open.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        alibi_slopes: (H) or (B, H): the score falls by slope times the distance of the key from the query's position.
        sinks: (H), a logit per head that takes part in the softmax and has no value.
        return_lse: also return LSE (B, H, L), float32 (float64 for float64 inputs).
        num_splits: parts into which the GPU's kernel splits the keys; None is as many as fill the device. With 1 the
            bits of a sequence's result do not depend on the rest of the batch, which on the CPU they never do.

    Returns:
        The output (B, H, L, Dv) in query's dtype; then, where asked for, LSE. A query without a key has output 0 and
        LSE -inf (with sinks: the sink).

    Lengths and tables are tensors that a GPU's kernels read: nothing is recompiled or captured again as they change. A
    length beyond the cache or a page outside the pool raises on the CPU, and on a GPU inside
    ``fastattn.debug_checks()``; elsewhere lengths are clamped to the cache, pages to the pool, and tokens without a
    place are dropped.

    On the CPU our C++ kernel reads the cache where it is; with float64, D > 256 or Dv other than D each sequence is a
    dense call with the keys it has. On a GPU without a verified kernel the cache is copied into one dense call with
    room for S_max keys.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; also where an input requires a
            gradient and gradients are enabled, because there is none here.
        RuntimeError: a backend forced with ``fastattn.backend`` cannot serve the call.
    """
    validation.check_flags(is_causal=is_causal, return_lse=return_lse)
    _check_caches(query, key_cache, value_cache, block_table)
    _check_integers("cache_lengths", cache_lengths, query, (query.shape[0],), "(B,)")
    _check_new(query, key_cache, value_cache, new_key, new_value)
    scale = validation.check_scale(scale, query.shape[-1])
    left, right = validation.check_window(window)
    cap = validation.check_softcap(softcap)
    if alibi_slopes is not None:
        alibi_slopes = validation.check_alibi_slopes(alibi_slopes, query)
    if sinks is not None:
        sinks = validation.check_sinks(sinks, query)
    _check_splits(num_splits)
    _check_no_gradient(
        query=query, key_cache=key_cache, value_cache=value_cache, new_key=new_key, new_value=new_value, sinks=sinks
    )
    if is_causal:
        right = 0 if right is None else min(right, 0)
    backend = _choose(query, value_cache)
    appended = 0
    new = () if new_key is None or new_value is None else (new_key, new_value)
    alone = onlookers.absent(query, key_cache, value_cache, *new) and onlookers.alike(cache_lengths)
    ops: Any = kv_cache_op.direct if alone else torch.ops.fastattn
    if new_key is not None:
        appended = new_key.shape[2]
        ops.kv_cache_append(key_cache, value_cache, new_key, new_value, cache_lengths, block_table, backend)
    out, logsumexp = ops.kv_cache_attention(
        query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, sinks, scale, cap, left, right,
        appended, num_splits, return_lse, backend,
    )  # fmt: skip
    return (out, logsumexp) if return_lse else out


def _choose(query: Tensor, value_cache: Tensor) -> str:
    """ "cpu" or "triton" where those kernels are forced or the usual choice, else "dense"."""
    forced = forced_backend()
    own = Backend.CPU if query.device.type == "cpu" and forced is not Backend.TRITON else Backend.TRITON
    reason = _why_not(own, query, value_cache)
    if forced in (Backend.TRITON, Backend.CPU):
        if forced is not own:
            reason = f"device {query.device.type}; the C++ kernels run on the CPU"
        if reason is not None:
            raise RuntimeError(f'fastattn.backend("{forced}") cannot serve this call: {reason}')
        return own.value
    usual = own is Backend.CPU or decode_launch.verified(query.device.type)
    return own.value if forced is None and reason is None and usual else "dense"


def _why_not(own: Backend, query: Tensor, value_cache: Tensor) -> str | None:
    if query.dtype not in _KERNEL_DTYPES:
        return f"dtype {query.dtype}; our kernels take float16, bfloat16 and float32"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {query.shape[-1]} > {MAX_HEAD_DIM}"
    if query.shape[-1] != value_cache.shape[-1]:
        return f"value_cache's head dimension {value_cache.shape[-1]} differs from query's {query.shape[-1]}"
    return extension.UNAVAILABLE if own is Backend.CPU else launch.why_unavailable(query.device.type)


def _check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor | None) -> None:
    _check_like_query(query, query=query, key_cache=key_cache, value_cache=value_cache)
    if query.dtype not in validation.FLOATING:
        raise ValueError(f"query: got dtype {query.dtype}, allowed are float16, bfloat16, float32 and float64")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0, expected at least 1")
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            raise ValueError(f"{name}: got stride {cache.stride(-1)} in the last dimension, expected it contiguous")
    if key_cache.shape[-1] != query.shape[-1]:
        raise ValueError(f"key_cache: got head_dim {key_cache.shape[-1]}, expected query's {query.shape[-1]}")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(
            f"value_cache: got shape {tuple(value_cache.shape)}, expected key_cache's {tuple(key_cache.shape[:3])} "
            "and a head_dim"
        )
    if key_cache.shape[1] == 0 or query.shape[1] % key_cache.shape[1] != 0:
        raise ValueError(f"key_cache: got {key_cache.shape[1]} heads, expected a divisor of query's {query.shape[1]}")
    if block_table is None:
        if key_cache.shape[0] != query.shape[0]:
            raise ValueError(
                f"key_cache: got batch size {key_cache.shape[0]}, expected query's {query.shape[0]}, or a block_table"
            )
        return
    _check_integers("block_table", block_table, query, (query.shape[0], None), "(B, max_pages)")
    if key_cache.shape[2] < _PAGE_MULTIPLE or key_cache.shape[2] % _PAGE_MULTIPLE != 0:
        raise ValueError(
            f"key_cache: got a page size of {key_cache.shape[2]} tokens, allowed are multiples of {_PAGE_MULTIPLE}"
        )


def _check_new(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, new_key: Tensor | None, new_value: Tensor | None
) -> None:
    if new_key is None and new_value is None:
        return
    if new_key is None or new_value is None:
        missing = "new_key" if new_key is None else "new_value"
        raise ValueError(f"{missing}: got None, expected new_key and new_value, or neither")
    _check_like_query(query, new_key=new_key, new_value=new_value)
    for name, new, cache_name, cache in (
        ("new_key", new_key, "key_cache", key_cache), ("new_value", new_value, "value_cache", value_cache),
    ):  # fmt: skip
        expected = (query.shape[0], cache.shape[1], new_key.shape[2], cache.shape[3])
        if tuple(new.shape) != expected:
            raise ValueError(f"{name}: got shape {tuple(new.shape)}, expected (B, Hkv, T, D) = {expected}")
        if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(f"{cache_name}: got an expanded tensor, expected memory of its own to append to")


def _check_like_query(query: Tensor, /, **tensors: Tensor) -> None:
    if onlookers.alike(query, *tensors.values()) and all(tensor.dim() == 4 for tensor in tensors.values()):
        return
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise ValueError(f"{name}: got layout {tensor.layout}, allowed is torch.strided (dense)")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected 4 dimensions (B, H, L, D)")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected query's {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")


def _check_integers(name: str, tensor: Tensor, query: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    validation.check_integers(name, tensor, query)
    fits = tensor.dim() == len(shape) and all(
        wanted is None or got == wanted for got, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {meaning} with B = {query.shape[0]}")


def _check_splits(num_splits: int | None) -> None:
    if num_splits is not None and (isinstance(num_splits, bool) or not isinstance(num_splits, int)):
        raise TypeError(f"num_splits: got {type(num_splits).__name__}, expected a positive integer or None")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: got {num_splits}, expected a positive integer or None")


def _check_no_gradient(**tensors: Tensor | None) -> None:
    if transforms.transformed():
        raise ValueError(f"query: got a call {transforms.REASON}, and attention_with_kv_cache is a kernel alone")
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient; attention_with_kv_cache has none: call it under "
                "torch.no_grad(), or train with scaled_dot_product_attention"
            )
