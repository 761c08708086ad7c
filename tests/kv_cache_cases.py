"""Calls of ``attention_with_kv_cache``, their float64 oracle, and the error budget of ``fastattn.testing``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.testing import assert_within_budget, largest_error

NAN = float("nan")


@dataclass(frozen=True)
class CacheCase:
    """One call with everything that can vary; ``page`` 0 is a contiguous cache, ``appended`` 0 appends nothing."""

    batch: int = 3
    heads: int = 2
    key_heads: int = 2
    rows: int = 1
    appended: int = 1
    capacity: int = 96
    page: int = 0
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "heads_first"  # "heads_first", "heads_last", "sliced"
    lengths: str = "random"  # "random", "full", "empty", "equal"
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: str | None = None  # "heads", "batch"
    sinks: bool = False
    scale: float | None = None
    splits: int | None = None
    length_dtype: torch.dtype = torch.int32
    seed: int = 0


@dataclass
class CacheInputs:
    """Tensors of a case; ``keys`` and ``values`` are what each sequence holds in the end, (Hkv, n, D) each."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    lengths: Tensor
    new_key: Tensor | None
    new_value: Tensor | None
    table: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    keys: list[Tensor]
    values: list[Tensor]


def make_inputs(case: CacheCase, device: str = "cpu") -> CacheInputs:
    """Random tensors, the same for the same case. What no sequence holds is NaN; pages are in random order."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    most = case.capacity - case.appended
    lengths = torch.randint(0, most + 1, (case.batch,), generator=generator)
    lengths = {"random": lengths, "full": lengths * 0 + most, "empty": lengths * 0, "equal": lengths * 0 + most // 2}[
        case.lengths
    ]
    sizes = (lengths + case.appended).tolist()
    keys = [draw(case.key_heads, size, case.head_dim) for size in sizes]
    values = [draw(case.key_heads, size, case.head_dim) for size in sizes]
    table = None
    pages, rows = case.batch, case.capacity
    if case.page:
        most_pages = case.capacity // case.page
        pages, rows = case.batch * most_pages + 2, case.page
        table = torch.randperm(pages, generator=generator)[: case.batch * most_pages].view(case.batch, most_pages)
        unused = torch.arange(most_pages) * case.page >= torch.tensor(sizes)[:, None]
        table = table.masked_fill(unused, -1).int()
    caches = []
    for tokens in (keys, values):
        cache = _laid_out(case, pages, rows)
        for number, held in enumerate(tokens):
            before = held[:, : sizes[number] - case.appended]
            for position in range(before.shape[1]):
                page, row = (int(table[number, position // rows]), position % rows) if case.page else (number, position)
                cache[page, :, row] = before[:, position]
        caches.append(cache.to(device) if device != "cpu" else cache)
    new_key, new_value = (
        torch.cat([draw(0, case.key_heads, case.appended, case.head_dim)] + [
            held[None, :, held.shape[1] - case.appended :] for held in tokens
        ]).to(device)
        if case.appended else None
        for tokens in (keys, values)
    )  # fmt: skip
    slopes = None
    if case.alibi:
        slopes = torch.rand((case.heads,) if case.alibi == "heads" else (case.batch, case.heads), generator=generator)
    sinks = draw(case.heads) if case.sinks else None
    return CacheInputs(
        draw(case.batch, case.heads, case.rows, case.head_dim).to(device), *caches,
        lengths.to(case.length_dtype).to(device), new_key, new_value,
        None if table is None else table.to(device), None if slopes is None else slopes.to(device),
        None if sinks is None else sinks.to(device), [key.to(device) for key in keys],
        [value.to(device) for value in values],
    )  # fmt: skip


def _laid_out(case: CacheCase, pages: int, rows: int) -> Tensor:
    heads, dim = case.key_heads, case.head_dim
    if case.layout == "heads_last":
        return torch.full((pages, rows, heads, dim), NAN, dtype=case.dtype).transpose(1, 2)
    if case.layout == "sliced":
        return torch.full((pages, heads, rows + 3, dim + 5), NAN, dtype=case.dtype)[:, :, 2 : rows + 2, :dim]
    return torch.full((pages, heads, rows, dim), NAN, dtype=case.dtype)


def call(case: CacheCase, inputs: CacheInputs) -> tuple[Tensor, Tensor]:
    """Output and LSE from the public function."""
    out, lse = fastattn.attention_with_kv_cache(
        inputs.query, inputs.key_cache, inputs.value_cache, inputs.lengths, new_key=inputs.new_key,
        new_value=inputs.new_value, block_table=inputs.table, is_causal=case.causal, scale=case.scale,
        window=case.window, softcap=case.softcap, alibi_slopes=inputs.slopes, sinks=inputs.sinks, return_lse=True,
        num_splits=case.splits,
    )  # fmt: skip
    return out, lse


def eager(case: CacheCase, inputs: CacheInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, float]:
    """Output and LSE, sequence by sequence in the arithmetic of ``dtype``, and the conditions of output and scores."""
    left, right = case.window or (None, None)
    if case.causal:
        right = 0 if right is None else min(right, 0)
    outs = [inputs.query[:0].to(dtype)]
    lses = [outs[0].sum(-1)]
    condition = largest = 0.0
    for number, (key, value) in enumerate(zip(inputs.keys, inputs.values, strict=True)):
        shift = key.shape[1] - case.rows
        slopes = inputs.slopes
        if slopes is not None:
            slopes = (slopes if slopes.dim() == 1 else slopes[number])[None].to(dtype)
        query, key, value = (part[None].to(dtype) for part in (inputs.query[number], key, value))
        arguments: dict[str, Any] = {
            "scale": case.scale or 1.0 / math.sqrt(case.head_dim), "softcap": case.softcap or 0.0, "shift": shift,
            "lower": None if left is None else shift - left, "upper": None if right is None else shift + right,
            "alibi_slopes": slopes, "sinks": None if inputs.sinks is None else inputs.sinks.to(dtype),
        }  # fmt: skip
        out, lse, weights = reference.attention(query, key, value, compute_dtype=dtype, **arguments)
        outs.append(out)
        lses.append(lse)
        group = case.heads // case.key_heads
        terms = weights @ value.abs().repeat_interleave(group, 1)
        condition = max(condition, float(terms.max()) if terms.numel() else 0.0)
        scores = query.abs() @ key.abs().repeat_interleave(group, 1).transpose(-1, -2) * abs(arguments["scale"])
        if slopes is not None:
            distance = torch.arange(key.shape[2]) - torch.arange(case.rows)[:, None] - shift
            scores = scores + slopes[:, :, None, None] * distance.abs().to(slopes.device)
        scores = scores[weights > 1e-30]
        largest = max(largest, float(scores.max()) if scores.numel() else 0.0)
        if inputs.sinks is not None:
            largest = max(largest, float(inputs.sinks.abs().max()))
    return torch.cat(outs), torch.cat(lses), condition, largest


def check(case: CacheCase, device: str = "cpu") -> None:
    """Raise AssertionError where the public function leaves the error budget, or the cache is not as it should be."""
    inputs = make_inputs(case, device)
    oracle_out, oracle_lse, condition, score = eager(case, inputs, torch.float64)
    plain_out, plain_lse, _, _ = eager(case, inputs, case.dtype)
    out, lse = call(case, inputs)
    assert out.dtype == case.dtype
    eps, eps32 = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps
    for name, ours, plain, oracle, roundings in (
        ("out", out, plain_out, oracle_out, (eps + eps32 * score) * condition),
        ("lse", lse, plain_lse, oracle_lse, (eps32 + eps32 * score) * max(score, 1.0)),
    ):
        assert_within_budget(case, name, ours, oracle, largest_error(plain, oracle), roundings)
    check_cache(case, inputs)


def check_cache(case: CacheCase, inputs: CacheInputs) -> None:
    """Each sequence holds its tokens, bit for bit, and everything else is what it was: NaN."""
    for cache, tokens in ((inputs.key_cache, inputs.keys), (inputs.value_cache, inputs.values)):
        written = 0
        for number, held in enumerate(tokens):
            size = held.shape[1]
            written += held.numel()
            if inputs.table is None:
                found = cache[number, :, :size]
            else:
                pages = inputs.table[number, : -(-size // case.page)].long()
                found = cache[pages].transpose(0, 1).flatten(1, 2)[:, :size]
            assert torch.equal(found, held)
        assert int(cache.isfinite().sum()) == written
