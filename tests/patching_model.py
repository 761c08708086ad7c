"""A model with attention somewhere inside and what it must still compute, for the tests of patch and unpatch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BATCH, LENGTH, EMBED, HEADS = 3, 7, 16, 4


def attention(**options: object) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(EMBED, HEADS, **{"batch_first": True, **options})


class Block(nn.Module):
    """An attention module somewhere inside a model."""

    def __init__(self, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = attn if attn is not None else attention()
        self.linear = nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.attn(x, x, x)[0])


def assert_same(got: object, wanted: object) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)
