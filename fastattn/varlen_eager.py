"""The eager definition of attention of packed sequences: a dense call for each pair of lengths there is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn import debug, functional


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int,
    scale: float, left: int | None, right: int | None, seqused_k: Tensor | None, block_table: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Output (Tq, H, Dv) and LSE (H, Tq) or None of checked arguments; differentiable."""
    query_bounds = cu_seq_q.tolist()
    debug.check_cu_seq("cu_seq_q", query_bounds, query.shape[0], max_q, "max_q")
    rows = _lengths(query_bounds)
    keys, values = _keys(key, value, cu_seq_k, max_k, seqused_k, block_table)
    # Splitting and stacking, not slicing: the gradient of a slice is a tensor of the whole pack for each sequence.
    queries = query.split(rows)
    outs: list[Tensor] = [query[:0]] * len(rows)
    lses: list[Tensor] = [query[:0, :, 0]] * len(rows)
    for members in _equal_lengths(rows, [part.shape[0] for part in keys]):
        if len(members) == len(rows):
            q, k, v = _whole(query, queries), _whole(key, keys), _whole(value, values)
        else:
            q, k, v = (_stack([parts[n] for n in members]) for parts in (queries, keys, values))
        # The same for as many keys as queries, and then torch's own kernels can serve a causal call.
        alignment = "top-left" if q.shape[1] == k.shape[1] else "bottom-right"
        result = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, enable_gqa=True, window=(left, right),
            causal_alignment=alignment, return_lse=return_lse,
        )  # fmt: skip
        out, lse = result if return_lse else (result, None)
        for n, part in zip(members, out.transpose(1, 2).unbind(), strict=True):
            outs[n] = part
        if lse is not None:
            for n, part in zip(members, lse.transpose(1, 2).unbind(), strict=True):
                lses[n] = part
    filled = [n for n, length in enumerate(rows) if length]
    if not filled:
        out = query.new_zeros(0, query.shape[1], value.shape[-1])
        lse = query.new_zeros(query.shape[1], 0, dtype=lse_dtype(query)) if return_lse else None
        return _attached(out, query, key, value), None if lse is None else _attached(lse, query, key)
    out = torch.cat([outs[n] for n in filled])
    lse = torch.cat([lses[n] for n in filled]).t() if return_lse else None
    if not any(keys[n].shape[0] for n in filled):
        out, lse = _attached(out, key, value), None if lse is None else _attached(lse, key)
    return out, lse


def _attached(result: Tensor, *inputs: Tensor) -> Tensor:
    """The result as part of the graph of inputs it does not depend on: their gradient is 0, not missing."""
    nothing: Tensor = sum((tensor[:0].sum() for tensor in inputs), start=result.new_zeros(()))
    return result + nothing.to(result.dtype)


def lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, query.dtype)


def _lengths(bounds: list[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(bounds)]


def _keys(
    key: Tensor, value: Tensor, cu_seq_k: Tensor | None, max_k: int, seqused_k: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:  # fmt: skip
    """Keys and values of each sequence."""
    if block_table is not None:
        assert seqused_k is not None
        debug.check_cache(seqused_k, 0, key.shape[1] * block_table.shape[1], block_table, key.shape[0])
        used = seqused_k.tolist()
        pages = [row[: -(-n // key.shape[1])].long() for row, n in zip(block_table, used, strict=True)]
        return tuple(
            [pool[where].flatten(0, 1)[:n] for where, n in zip(pages, used, strict=True)] for pool in (key, value)
        )  # type: ignore[return-value]
    assert cu_seq_k is not None
    bounds = cu_seq_k.tolist()
    debug.check_cu_seq("cu_seq_k", bounds, key.shape[0], max_k, "max_k")
    lengths = _lengths(bounds)
    keys, values = key.split(lengths), value.split(lengths)
    if seqused_k is None:
        return keys, values
    used = seqused_k.tolist()
    debug.check_used(used, bounds)
    return (
        [part[:n] for part, n in zip(keys, used, strict=True)],
        [part[:n] for part, n in zip(values, used, strict=True)],
    )


def _whole(packed: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Parts of one length as one tensor; where they are all of ``packed``, a view of it."""
    number, length = len(parts), parts[0].shape[0]
    if packed.dim() == 3 and packed.shape[0] == number * length:
        whole: Tensor = packed.unflatten(0, (number, length))
        return whole
    return _stack(parts)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """``torch.stack``; a single part is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _equal_lengths(rows: list[int], columns: list[int]) -> list[list[int]]:
    """Numbers of the sequences that have a query, those with as many queries and keys together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
        if row:
            groups.setdefault((row, column), []).append(number)
    return list(groups.values())
