"""Additive attention against its plain eager form, which holds the (B, Tq, Tk, D) tensor.

    pytest benchmarks/test_additive.py --benchmark-only [--record FILE] [--seconds-left N]

Rows stand in order of importance. Every row asserts that both answers agree. The work of a call is counted as four
operations for each of the B Tq Tk D evaluations of tanh and two for each product with the values; training is three
times that.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from measure import OURS, Call, compare
from torch import Tensor

import fastattn
from fastattn.profiling.environment import default_device

DEVICE = default_device()
CUDA = DEVICE.type == "cuda"
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32,)
EAGER = "eager"
# (batch, queries, keys, features): a batch of translations, a long document, one step of a decoder.
SHAPES = [(4, 64, 128, 256), (1, 256, 1024, 256), (16, 1, 100, 512)]
if CUDA:
    SHAPES = [(32, 128, 128, 512), (8, 256, 2048, 512), (64, 1, 100, 512)]


def eager(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, padding: Tensor, coverage: Tensor | None = None,
    coverage_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a model without this package writes."""
    total = query.unsqueeze(2) + key.unsqueeze(1)
    if coverage is not None and coverage_weight is not None:
        total = total + coverage[:, None, :, None] * coverage_weight
    scores = (total.tanh() @ weight).masked_fill(~padding.unsqueeze(1), float("-inf"))
    return scores.softmax(-1) @ value


def ours(*tensors: Tensor, backend: str = "auto") -> Tensor:
    query, key, value, weight, padding, *more = tensors
    coverage = dict(zip(("coverage", "coverage_weight"), more, strict=False))
    with fastattn.backend(backend):
        out: Tensor = fastattn.additive_attention(query, key, value, weight, key_padding_mask=padding, **coverage)
    return out


def bound(run: Any, tensors: list[Tensor], training: bool) -> Call:
    """Output, and in training the gradients of queries and keys.

    That of the weight is computed too. It is one sum over all entries, most of which cancel: the eager form errs by
    1e-5 of it, too much to compare with; the tests compare it with float64.
    """
    leaves = [tensors[0], tensors[1], tensors[3]]

    def call() -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [run(*tensors)]
        out = run(*tensors)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))[:2]]

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", ["full", "padded", "coverage"])
def test_function(
    benchmark: Any, keep: Any, kind: str, training: bool, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch, rows, columns, features = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=dtype, requires_grad=training)

    tensors = [draw(batch, length, features) for length in (rows, columns, columns)]
    # Scores of the size that a trained model has: the answers of half precision can then be compared.
    tensors.append((torch.randn(features, device=DEVICE) / features**0.5).to(dtype).requires_grad_(training))
    lengths = torch.full((batch,), columns, device=DEVICE)
    if kind == "padded":  # spread evenly, half of all keys are padding
        lengths = torch.tensor([max(1, columns * (2 * i + 1) // (2 * batch)) for i in range(batch)], device=DEVICE)
    tensors.append(torch.arange(columns, device=DEVICE) < lengths[:, None])
    if kind == "coverage":
        tensors += [torch.rand(batch, columns, device=DEVICE, dtype=dtype), draw(features)]
    runs = {OURS: ours, EAGER: eager}
    if CUDA:
        runs["fastattn triton"] = functools.partial(ours, backend="triton")
    calls = {name: bound(run, tensors, training) for name, run in runs.items()}
    flops = (4.0 + 2.0) * rows * float(lengths.sum()) * features * (3.0 if training else 1.0)
    row = compare(benchmark, calls, DEVICE, flops=flops)
    keep({"shape": shape, "dtype": str(dtype), "kind": kind, "training": training} | row, DEVICE)
