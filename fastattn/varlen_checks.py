"""Checks of the arguments of ``varlen_attention`` that need no value of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import validation


def check_packed(query: Tensor, key: Tensor, value: Tensor, *, paged: bool, enable_gqa: bool) -> None:
    """query (Tq, H, D); key, value (Tk, Hkv, D), or pools of pages (pages, page_size, Hkv, D)."""
    validation.check_flags(enable_gqa=enable_gqa)
    expected = "4 dimensions (pages, page_size, H, D)" if paged else "3 dimensions (tokens, H, D)"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.is_nested or tensor.layout != torch.strided:
            raise ValueError(f"{name}: got layout {tensor.layout}, allowed is torch.strided (dense)")
        if tensor.dim() != (4 if paged and name != "query" else 3):
            wanted = "3 dimensions (tokens, H, D)" if name == "query" else expected
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {wanted}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected query's {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")
    if query.dtype not in validation.FLOATING:
        raise ValueError(f"query: got dtype {query.dtype}, allowed are float16, bfloat16, float32 and float64")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value: got shape {tuple(value.shape)}, expected key's {tuple(key.shape[:-1])} and Dv")
    heads, key_heads = query.shape[1], key.shape[-2]
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: got head_dim {key.shape[-1]}, expected query's {query.shape[-1]}")
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError(f"head_dim: got {query.shape[-1]} (value {value.shape[-1]}), expected at least 1")
    if heads != key_heads and not enable_gqa:
        raise ValueError(
            f"key: got {key_heads} heads, expected query's {heads} (grouped heads need enable_gqa=True)"
        )
    if heads != key_heads and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(f"key: got {key_heads} heads, expected a divisor of query's {heads} for enable_gqa")


def check_cu_seq_tensor(name: str, bounds: Tensor, query: Tensor, sequences: int | None) -> None:
    """(N + 1) integers on query's device."""
    validation.check_integers(name, bounds, query)
    if bounds.dim() != 1 or bounds.shape[0] < 1:
        raise ValueError(f"{name}: got shape {tuple(bounds.shape)}, expected (N + 1) boundaries of N sequences")
    if sequences is not None and bounds.shape[0] != sequences + 1:
        raise ValueError(f"{name}: got {bounds.shape[0]} boundaries, expected cu_seq_q's {sequences + 1}")


def check_paged(
    query: Tensor, key: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, seqused_k: Tensor | None,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Where the keys of each sequence are: cu_seq_k, or a block_table with seqused_k."""
    sequences = cu_seq_q.shape[0] - 1
    if cu_seq_k is not None:
        check_cu_seq_tensor("cu_seq_k", cu_seq_k, query, sequences)
    elif block_table is None:
        raise ValueError("cu_seq_k: got None, expected (N + 1) boundaries, or a block_table with seqused_k")
    if seqused_k is not None:
        validation.check_integers("seqused_k", seqused_k, query)
        if tuple(seqused_k.shape) != (sequences,):
            raise ValueError(f"seqused_k: got shape {tuple(seqused_k.shape)}, expected (N) = ({sequences},)")
    if block_table is None:
        return
    if seqused_k is None:
        raise ValueError("seqused_k: got None, expected (N) lengths beside a block_table")
    validation.check_integers("block_table", block_table, query)
    if block_table.dim() != 2 or block_table.shape[0] != sequences:
        raise ValueError(f"block_table: got shape {tuple(block_table.shape)}, expected (N, max_pages), N = {sequences}")
    if key.shape[1] == 0:
        raise ValueError("key: got pages of 0 tokens, expected at least 1")


def check_longest(**lengths: int) -> None:
    for name, length in lengths.items():
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"{name}: got {type(length).__name__}, expected an integer")
        if length < 0:
            raise ValueError(f"{name}: got {length}, expected at least 0")


def check_inference_only(query: Tensor, key: Tensor, value: Tensor, **arguments: Tensor | None) -> None:
    """torch's kernels have no gradient with these."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (query, key, value)):
        return
    for name, argument in arguments.items():
        if argument is not None:
            raise ValueError(f"{name}: got a tensor beside inputs that require a gradient; it is for inference only")
