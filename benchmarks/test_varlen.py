"""Attention of packed sequences against its peers: torch's own function for them, padding, and a loop.

    pytest benchmarks/test_varlen.py --benchmark-only [--record FILE] [--seconds-left N]

Every row asserts that all answers agree. FLOP count the pairs within sequences, half of them when causal.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from measure import OURS, Call, attention_flops, compare
from test_attention import in_evaluation, in_training, on
from torch import Tensor, nn

import fastattn
from fastattn.profiling.environment import default_device

DEVICE = default_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# (sequences, longest, heads, head dimension).
SHAPES = [(16, 512, 8, 64), (64, 64, 8, 64)]
if CUDA:
    SHAPES = [(16, 2048, 16, 128), (64, 512, 16, 64), (4, 16384, 16, 64)]
# Lengths of the sequences: all the longest, or spread evenly from short to long.
KINDS = {"equal": False, "spread": True}

sdpa = nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed(
    benchmark: Any, keep: Any, kind: str, causal: bool, training: bool, shape: tuple[int, int, int, int]
) -> None:
    number, longest, heads, dim = shape
    lengths = [max(1, longest * (2 * n + 1) // (2 * number)) if KINDS[kind] else longest for n in range(number)]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    leaves = [
        torch.randn(sum(lengths), heads, dim, device=DEVICE, dtype=DTYPE, requires_grad=training) for _ in range(3)
    ]
    window = (-1, 0) if causal else (-1, -1)
    valid = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]

    def ours() -> Any:
        return fastattn.varlen_attention(*leaves, bounds, bounds, longest, longest, window_size=window)

    def loop() -> Tensor:
        parts = zip(*(leaf.split(lengths) for leaf in leaves), strict=True)
        outs = [sdpa(*(part.transpose(0, 1)[None] for part in three), is_causal=causal) for three in parts]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def padded() -> Tensor:
        empty = leaves[0].new_zeros(number, longest, heads, dim)
        three = [empty.masked_scatter(valid[..., None, None], leaf).transpose(1, 2) for leaf in leaves]
        mask = valid[:, None, None]
        if causal:
            mask = mask & torch.ones(longest, longest, dtype=torch.bool, device=DEVICE).tril()
        return sdpa(*three, attn_mask=mask).transpose(1, 2)[valid]

    runs = {OURS: on("triton", ours) if CUDA else ours, "SDPA in a loop": loop, "SDPA padded": padded}
    if CUDA:
        from torch.nn.attention.varlen import varlen_attn

        runs["varlen_attn"] = lambda: varlen_attn(*leaves, bounds, bounds, longest, longest, window_size=window)
    calls: dict[str, Call] = {
        name: in_training(run, leaves) if training else in_evaluation(run) for name, run in runs.items()
    }
    flops = sum(attention_flops(1, heads, n, n, dim, causal=causal, training=training) for n in lengths)
    row = compare(benchmark, calls, DEVICE, flops=flops)
    keep({"shape": shape, "dtype": str(DTYPE), "kind": kind, "causal": causal, "training": training} | row, DEVICE)
