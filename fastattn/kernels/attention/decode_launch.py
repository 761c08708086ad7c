"""Launching the decode kernels. Nothing is read from the device: grids and parts follow from shapes alone, so that a
CUDA graph of a step serves every length."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.attention import decode_config, shapes
from fastattn.kernels.attention.arguments import Heads
from fastattn.kernels.attention.config import block_d
from fastattn.kernels.device import on

try:
    import triton

    from fastattn.kernels.attention import decode
except ImportError:  # ``launch.why_unavailable`` tells the user
    pass

# (compute capability, Triton minor version) on which the GPU tests of the decode kernels have passed. Only these may be
# chosen without being asked for.
VERIFIED: frozenset[tuple[tuple[int, int], str]] = frozenset()
# Multiprocessors where there is no device to ask: the interpreter, and compiling without one.
_PROCESSORS = 132


def verified(device_type: str) -> bool:
    """Whether this device and this Triton have passed the GPU tests of the decode kernels."""
    if device_type != "cuda" or not VERIFIED:
        return False
    return (torch.cuda.get_device_capability(), triton.__version__.rsplit(".", 1)[0]) in VERIFIED


def attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, left: int | None,
    right: int | None, appended: int, num_splits: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, H, L, D) and LSE (B, H, L) float32; arguments as ``fastattn.kv_cache_op``'s."""
    batch, heads, rows, head_dim = query.shape
    key_heads = key_cache.shape[1]
    out = shapes.empty_output(query, value_cache)
    logsumexp = query.new_empty((batch, heads, rows), dtype=torch.float32)
    if logsumexp.numel() == 0:
        return out, logsumexp
    sequences = _sequences(key_cache, cache_lengths, block_table, appended)
    tile = decode_config.tile(query.dtype, head_dim, heads // key_heads * rows)
    row_tiles = triton.cdiv(heads // key_heads * rows, tile.block_m)
    programs = batch * key_heads * row_tiles
    splits = num_splits or decode_config.splits(programs, sequences.capacity, _processors(query.device))
    splits = min(splits, decode_config.MAX_SPLITS)
    if splits > 1:
        partial = query.new_empty((splits, batch, heads, rows, head_dim), dtype=torch.float32)
        partial_logsumexp = query.new_empty((splits, batch, heads, rows), dtype=torch.float32)
        written, split_stride = Heads(partial, *partial.stride()[1:4]), partial.stride(0)
    else:
        partial, partial_logsumexp, written, split_stride = out, logsumexp, _heads(out), 0
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    features = decode.DecodeFeatures(
        softcap=softcap > 0.0,
        has_lower=left is not None,
        has_upper=right is not None,
        page=0 if block_table is None else key_cache.shape[2],
        precision="ieee" if exact else "tf32",
    )
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    slopes_batch = 0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0)
    scoring = decode.Scoring(
        scale / softcap if softcap > 0.0 else scale, softcap, slopes, slopes_batch, 0 if left is None else -left,
        0 if right is None else right,
    )
    shape = decode.DecodeShape(batch, key_heads, heads // key_heads, rows, splits)
    common = {"DIM": head_dim, "BLOCK_D": block_d(head_dim)}
    with on(query.device):
        decode.decode_split[(programs * splits,)](
            query=_heads(query), key=_heads(key_cache), value=_heads(value_cache), out=written, out_split=split_stride,
            logsumexp=partial_logsumexp, sinks=sinks if splits == 1 else None, sequences=sequences, scoring=scoring,
            shape=shape, F=features, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=tile.registers, **common,
        )  # fmt: skip
        if splits > 1:
            decode.decode_combine[(batch * heads * rows,)](
                partial=partial, partial_logsumexp=partial_logsumexp, out=_heads(out), logsumexp=logsumexp, sinks=sinks,
                shape=shape, BLOCK_S=triton.next_power_of_2(splits), STEP=decode_config.COMBINE_STEP, **common,
            )  # fmt: skip
    return out, logsumexp


def append(
    key_cache: Tensor, value_cache: Tensor, new_key: Tensor, new_value: Tensor, cache_lengths: Tensor,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Write the new tokens into the cache, in place."""
    batch, key_heads, appended, head_dim = new_key.shape
    if new_key.numel() == 0:
        return
    features = decode.DecodeFeatures(False, False, False, 0 if block_table is None else key_cache.shape[2], "ieee")
    tiles = triton.cdiv(appended, decode_config.APPEND_TOKENS)
    with on(key_cache.device):
        decode.append_tokens[(batch * key_heads * tiles,)](
            new_key=_heads(new_key), new_value=_heads(new_value), key=_heads(key_cache), value=_heads(value_cache),
            sequences=_sequences(key_cache, cache_lengths, block_table, appended), key_heads=key_heads, F=features,
            DIM=head_dim, VALUE_DIM=new_value.shape[3], BLOCK_D=block_d(max(head_dim, new_value.shape[3])),
            BLOCK_T=decode_config.APPEND_TOKENS,
        )  # fmt: skip


def _sequences(key_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None, appended: int) -> Any:
    lengths = cache_lengths.contiguous()
    if block_table is None:
        return decode.Sequences(lengths, appended, key_cache.shape[2], None, 0, 0)
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    capacity = key_cache.shape[2] * block_table.shape[1] if key_cache.shape[0] else 0
    return decode.Sequences(lengths, appended, capacity, block_table, block_table.stride(0), key_cache.shape[0])


def _heads(tensor: Tensor) -> Any:
    """A (B, H, L, D) tensor; only inputs that are not written to may need the copy."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    return Heads(tensor, *tensor.stride()[:3])


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
