"""Tensors as the kernels are given them: pointers and strides, and where masks and segments begin and end."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.kernels.attention import arguments
from fastattn.kernels.attention.padding import key_bounds
from fastattn.kernels.attention.segments import segment_bounds
from fastattn.kernels.device import on

_BOUNDS_BLOCK, _SEGMENT_BLOCK = 1024, 128
# The kernels' offsets inside a tile are 32-bit: at most 256 rows of this many elements each.
_MAX_STRIDE = 2**31 // 256 - 1


def mask(attn_mask: Tensor | None) -> tuple[Any, ...]:
    """Pointer and strides, 0 where the mask is broadcast."""
    if attn_mask is None:
        return None, 0, 0, 0, 0
    if max(attn_mask.stride()[2:]) > _MAX_STRIDE:
        attn_mask = attn_mask.contiguous()
    strides = (0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))
    return _bytes(attn_mask), *strides


def padding(mask: Tensor | None) -> tuple[Any, ...]:
    """Pointer, strides, the first and one past the last key (B) that is not padding, whether there is any between."""
    if mask is None:
        return None, 0, 0, None, None, None
    return _bytes(mask), *mask.stride(), *bounds(mask)


def bounds(mask: Tensor) -> list[Tensor]:
    """What ``key_bounds`` finds in a padding mask (B, S)."""
    found = [mask.new_empty(mask.shape[0], dtype=torch.int32) for _ in range(3)]
    with on(mask.device):
        key_bounds[(mask.shape[0],)](
            _bytes(mask), *found, *mask.stride(), mask.shape[1], PADDING_BOOL=mask.dtype == torch.bool,
            BLOCK_N=_BOUNDS_BLOCK,
        )  # fmt: skip
    return found


def segments(query: Tensor | None, key: Tensor | None) -> tuple[Any, ...]:
    """Both, and for each 16 of one side the stretch of the other side that holds their segments."""
    if query is None or key is None:
        return (None,) * 6
    query, key = query.contiguous(), key.contiguous()
    bounds: list[Tensor] = []
    for own, other in ((query, key), (key, query)):
        (batch, length), blocks = own.shape, triton.cdiv(own.shape[1], 16)
        start, end = (own.new_empty(batch, blocks, dtype=torch.int32) for _ in range(2))
        with on(own.device):
            segment_bounds[(batch * blocks,)](
                own, other, start, end, length, other.shape[1], BLOCK=_SEGMENT_BLOCK
            )
        bounds += [start, end]
    return query, key, *bounds


def batch_stride(slopes: Tensor) -> int:
    """Of slopes (B or 1, H), whose heads are neighbours."""
    return 0 if slopes.shape[0] == 1 else slopes.stride(0)


def _bytes(mask: Tensor | None) -> Tensor | None:
    """Booleans as the bytes they are stored in."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def heads(tensor: Tensor | None) -> arguments.Heads:
    """A (B, H, L, D) tensor for a kernel; copied first if its last dimension is not contiguous."""
    if tensor is None:
        return arguments.Heads(None, 0, 0, 0)
    if (tensor.stride(-1) != 1 and tensor.shape[-1] != 1) or tensor.stride(2) > _MAX_STRIDE:
        tensor = tensor.contiguous()
    return arguments.Heads(tensor, *tensor.stride()[:3])


def weights(tensor: Tensor | None) -> arguments.Weights:
    """A (B, H, L, S) tensor of any strides for a kernel."""
    if tensor is None:
        return arguments.Weights(None, 0, 0, 0, 0)
    if max(tensor.stride()[2:]) > _MAX_STRIDE:
        tensor = tensor.contiguous()
    return arguments.Weights(tensor, *tensor.stride())
