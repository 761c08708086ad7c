"""Packs of sequences for the tests of ``varlen_attention`` and of its operators."""

from __future__ import annotations

from typing import Any

import torch
from backends import DEVICE
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

LSE = AuxRequest(lse=True)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def bounds(lengths: list[int]) -> Tensor:
    return ints(0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist())


def packed(rows: list[int], columns: list[int], heads: int = 4, key_heads: int = 2, **kwargs: Any) -> list[Tensor]:
    """query, key, value."""
    sizes = ((sum(rows), heads, 8), (sum(columns), key_heads, 8), (sum(columns), key_heads, 8))
    return [torch.randn(size, device=DEVICE, **kwargs) for size in sizes]
