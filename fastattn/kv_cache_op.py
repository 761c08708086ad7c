"""The cache operators: schema and shape rule; lengths stay in a tensor, so a compiled step serves every length.

| operator (torch.ops.fastattn)  | does                                                                       |
|--------------------------------|----------------------------------------------------------------------------|
| kv_cache_append                | writes new keys and values into the cache, in place                        |
| kv_cache_attention             | returns out (B, H, L, Dv) and LSE (B, H, L), empty unless ``return_lse``   |

query (B, H, L, D); caches (B, Hkv, S, D) and (B, Hkv, S, Dv), or (pages, Hkv, page size, D) with block_table
(B, max_pages); cache_lengths (B,), tokens before ``appended`` more; alibi_slopes (1 or B, H); sinks (H); key j takes
part for the query at position p where p - left <= j <= p + right, None leaves a side open; backend "triton", "cpu", or
"dense" for the dense function on whatever backend is in force. None of them has a gradient.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastattn import debug, kv_cache_eager
from fastattn.kernels.attention import decode_launch, extension, shapes

_SCHEMAS = {
    "kv_cache_append": (
        "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor new_key, Tensor new_value, Tensor cache_lengths, "
        "Tensor? block_table, str backend) -> ()"
    ),
    "kv_cache_attention": (
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, Tensor? block_table, "
        "Tensor? alibi_slopes, Tensor? sinks, float scale, float softcap, SymInt? left, SymInt? right, "
        "SymInt appended, SymInt? num_splits, bool return_lse, str backend) -> (Tensor, Tensor)"
    ),
}

_library = torch.library.Library("fastattn", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _append(
    key_cache: Tensor, value_cache: Tensor, new_key: Tensor, new_value: Tensor, cache_lengths: Tensor,
    block_table: Tensor | None, backend: str,
) -> None:  # fmt: skip
    given = (key_cache, value_cache, new_key, new_value, cache_lengths, block_table)
    if backend == "cpu":
        extension.kv_cache_append(*given)
    else:
        _check(key_cache, cache_lengths, block_table, new_key.shape[2])
        write = decode_launch.append if backend == "triton" else kv_cache_eager.append
        write(*given)
    if backend in ("cpu", "triton"):
        # Kernels write past torch, which must refuse a backward that needs the cache as it was.
        torch.autograd.graph.increment_version((key_cache, value_cache))


def _attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, left: int | None,
    right: int | None, appended: int, num_splits: int | None, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend == "cpu":  # it checks lengths and table itself
        out, logsumexp = extension.kv_cache_attention(
            query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, sinks, scale, softcap, left, right,
            appended,
        )  # fmt: skip
        return out, logsumexp if return_lse else _no_lse(query)
    if appended == 0:  # else they were checked before the append
        _check(key_cache, cache_lengths, block_table, 0)
    if backend == "triton":
        out, logsumexp = decode_launch.attention(
            query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, sinks, scale, softcap, left, right,
            appended, num_splits,
        )  # fmt: skip
        return out, logsumexp if return_lse else _no_lse(query)
    how = kv_cache_eager.Scoring(scale, softcap or None, (left, right), alibi_slopes, sinks, return_lse)
    # Dtypes are what the shape rule promised: autocast has done its part before the operator.
    with torch.autocast(query.device.type, enabled=False):
        result = kv_cache_eager.attention(
            query, key_cache, value_cache, cache_lengths + appended, block_table, how
        )
    out, logsumexp = result if return_lse else (result, _no_lse(query))
    # The operator's output has one layout whatever the backend: a compiler relies on it.
    return shapes.empty_output(query, value_cache).copy_(out), logsumexp.to(_lse_dtype(query)).contiguous()


def _check(key_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None, appended: int) -> None:
    if debug.may_read(cache_lengths):
        room = kv_cache_eager.capacity(key_cache, block_table)
        debug.check_cache(cache_lengths, appended, room, block_table, key_cache.shape[0])


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, query.dtype)


def _no_lse(query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=_lse_dtype(query))


for _name, _call in (("kv_cache_append", _append), ("kv_cache_attention", _attention)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _call, _key)
# What the dispatcher reaches, for a call that nobody looks on: the way through it costs as much as a short kernel.
direct = SimpleNamespace(kv_cache_append=_append, kv_cache_attention=_attention)


@torch.library.register_fake("fastattn::kv_cache_append", lib=_library)
def _append_fake(*_: Any) -> None:
    return None


@torch.library.register_fake("fastattn::kv_cache_attention", lib=_library)
def _attention_fake(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    out = shapes.empty_output(query, value_cache)
    return out, query.new_empty(query.shape[:3], dtype=_lse_dtype(query)) if rest[-2] else _no_lse(query)
