"""Tensor descriptors of what a kernel reads by tiles: the copy engine (TMA) fetches a tile from its coordinates.

No thread then holds addresses or comparisons for it: a forward tile of 128 x 128 at head dimension 128 takes 188
registers, not 242. What lies past the rows and features of a tensor reads 0. To look at a tensor and describe it takes
the host some 4 us at every launch, before the driver encodes it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels.attention.arguments import Heads
from fastattn.kernels.attention.config import Tile

# What the kernels read by tiles of queries (block_m rows) and of keys (block_n).
_OF_QUERIES, _OF_KEYS = ("query", "dout"), ("key", "value")
_ALIGNED = 16  # bytes: of the address and of all strides but the last


def possible(tensors: Mapping[str, Any]) -> bool:
    """Whether all that is read by tiles can be described."""
    return all(describable(tensors[name]) for name in (*_OF_QUERIES, *_OF_KEYS) if name in tensors)


def describable(heads: Heads) -> bool:
    """Whether the copy engine can read a half-precision (B, H, L, D) tensor where it lies.

    Strides of dimensions with one place do not count. Others may come in any order, but not be 0: nobody promises that
    an expanded tensor can be read. float32 is not read by tiles of all features (``product_piece``).
    """
    tensor = heads.pointer
    if tensor is None or tensor.element_size() != 2:
        return False
    strides = [stride for size, stride in zip(tensor.shape, heads[1:], strict=False) if size > 1]
    return tensor.data_ptr() % _ALIGNED == 0 and all(stride > 0 and 2 * stride % _ALIGNED == 0 for stride in strides)


def of(tensors: Mapping[str, Any], tile: Tile, block_d: int) -> dict[str, TensorDescriptor]:
    """By name, the descriptors to read ``tensors`` by tiles with."""
    rows = dict.fromkeys(_OF_QUERIES, tile.block_m) | dict.fromkeys(_OF_KEYS, tile.block_n)
    return {name: _of_heads(tensors[name], block, block_d) for name, block in rows.items() if name in tensors}


def of_gluon(heads: Heads, block: int, block_d: int) -> GluonDescriptor:
    """The descriptor to read or write one tensor with by tiles of ``block`` rows, for a kernel in Gluon."""
    return GluonDescriptor(
        heads.pointer, *_shape_and_strides(heads), [1, 1, block, block_d], _layout(heads.pointer.dtype, block, block_d)
    )


@functools.cache
def _layout(dtype: torch.dtype, block: int, block_d: int) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory: swizzled as wgmma reads it."""
    number = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, block, block_d], number)


def _of_heads(heads: Heads, block: int, block_d: int) -> TensorDescriptor:
    return TensorDescriptor(heads.pointer, *_shape_and_strides(heads), [1, 1, block, block_d])


def _shape_and_strides(heads: Heads) -> tuple[list[int], list[int]]:
    shape = list(heads.pointer.shape)
    strides = [stride if size > 1 else _ALIGNED for size, stride in zip(shape, heads[1:], strict=False)]
    return shape, [*strides, 1]
