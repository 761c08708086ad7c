"""Attention of a few new queries to a cache of keys and values, split along the keys (Flash-Decoding, Dao et al. 2023).

The queries of one key head, group x L of them, are the rows of one tile: every key is read once for all of them. Row r
is query r // group of head r % group of the group. One program folds one part of the keys,

    LSE_s = log sum_{j in part s} exp S_ij,   O_s = sum_{j in part s} exp(S_ij - LSE_s) v_j

and a second kernel puts the parts together:

    LSE = log(exp sink + sum_s exp LSE_s),   O = sum_s exp(LSE_s - LSE) O_s

The parts divide what a sequence holds, not what the cache has room for, so the grid depends on shapes alone.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.attention.primitives import LOG2E, capped


class Sequences(NamedTuple):
    """Lengths (B,) before ``appended`` more tokens, of at most ``capacity``; the table (B, max_pages) of a pool of
    ``pages``, None for a contiguous cache."""

    lengths: Any
    appended: Any
    capacity: Any
    table: Any
    table_batch: Any
    pages: Any


class DecodeShape(NamedTuple):
    """Batches, key heads, query heads of one key head, queries L, parts of the keys.

    The kernels are specialised on those of its numbers that are 1 or a multiple of 16, as on every tuple's: one token
    at a time is compiled apart from a prompt. No step of a decoder compiles anything: lengths lie on the device.
    """

    batches: Any
    key_heads: Any
    group: Any
    rows: Any
    splits: Any


class Scoring(NamedTuple):
    """Scale, over the cap where there is one; cap; ALiBi slopes (B or 1, H) or None; and the band lower <= key -
    position of the query <= upper."""

    scale: Any
    cap: Any
    slopes: Any
    slopes_batch: Any
    lower: Any
    upper: Any


@dataclass(frozen=True)
class DecodeFeatures:
    """What is compiled in; ``page``: tokens of a page, 0 for a contiguous cache."""

    softcap: bool
    has_lower: bool
    has_upper: bool
    page: int
    precision: str


@triton.jit
def exp(x):
    """e**x; exp2 is the instruction there is."""
    return tl.exp2(x * LOG2E)


@triton.jit
def held(sequences, batch):
    """Tokens of a sequence, the appended ones included; never more than there is room for."""
    length = tl.load(sequences.lengths + batch).to(tl.int64) + sequences.appended
    return tl.minimum(tl.maximum(length, 0), sequences.capacity).to(tl.int32)


@triton.jit
def cache_rows(cache, sequences, batch, head, column, inside, F: tl.constexpr):
    """Where the tokens ``column`` of a sequence stand, and which of them may be written; reading may use all.

    A table that points outside the pool is clamped.
    """
    if F.page > 0:
        address = sequences.table + batch.to(tl.int64) * sequences.table_batch + column // F.page
        page = tl.load(address, mask=inside, other=0).to(tl.int64)
        inside = inside & (page >= 0) & (page < sequences.pages)
        page = tl.minimum(tl.maximum(page, 0), sequences.pages - 1)
        row = column % F.page
    else:
        page = batch.to(tl.int64) + tl.zeros_like(column)
        row = column
    start = page * cache.batch + head.to(tl.int64) * cache.head + row.to(tl.int64) * cache.row
    return cache.pointer + start, inside


@triton.jit
def load_cache(
    cache, sequences, batch, head, column, inside, F: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Tokens ``column`` of one head as (BN, BD); outside and past DIM reads 0."""
    row, _ = cache_rows(cache, sequences, batch, head, column, inside, F)
    feature = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(row[:, None] + feature, mask=inside[:, None] & (feature < DIM), other=0.0)


@triton.jit
def _within_band(score, distance, lower, upper, F: tl.constexpr):
    """-inf where not lower <= distance <= upper; distance is that of the key from the query."""
    if F.has_lower:
        score = tl.where(distance >= lower, score, float("-inf"))
    if F.has_upper:
        score = tl.where(distance <= upper, score, float("-inf"))
    return score


@triton.jit
def decode_score(product, column, position, inside, slope, scoring, F: tl.constexpr):
    """Scores of a tile (BM, BN) from its products: scale, cap, ALiBi, -inf where the entry takes no part."""
    score, _ = capped(product * scoring.scale, scoring.cap, F)
    distance = column[None, :] - position[:, None]
    if scoring.slopes is not None:
        score = score - slope[:, None] * tl.abs(distance).to(tl.float32)
    score = tl.where(inside[None, :], score, float("-inf"))
    return _within_band(score, distance, scoring.lower, scoring.upper, F)


@triton.jit
def add_sink(logsumexp, sink):
    """(LSE with a sink, the factor on the output)."""
    maximum = tl.maximum(logsumexp, sink)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = exp(logsumexp - pivot) + exp(sink - pivot)
    result = pivot + tl.log(total)
    return result, tl.where(total == 0.0, 0.0, exp(logsumexp - pivot) / tl.where(total == 0.0, 1.0, total))


@triton.jit
def decode_split(
    query, key, value, out, out_split, logsumexp, sinks, sequences, scoring, shape,
    F: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """query (B, H, L, D), cache -> out (splits, B, H, L, D), logsumexp (splits, B, H, L) float32.

    sinks (H) only where one part is all.
    """
    packed_rows = shape.rows * shape.group
    row_tiles = tl.cdiv(packed_rows, BLOCK_M)
    program = tl.program_id(0)
    split = program % shape.splits
    first_row = program // shape.splits % row_tiles * BLOCK_M
    batch_head = program // shape.splits // row_tiles
    batch = batch_head // shape.key_heads
    key_head = batch_head % shape.key_heads
    b = batch.to(tl.int64)
    packed = first_row + tl.arange(0, BLOCK_M)
    row = packed // shape.group
    head = key_head * shape.group + packed % shape.group
    real = packed < packed_rows
    feature = tl.arange(0, BLOCK_D)[None, :]
    stored = real[:, None] & (feature < DIM)

    start = query.pointer + b * query.batch + head.to(tl.int64) * query.head + row.to(tl.int64) * query.row
    queries = tl.load(start[:, None] + feature, mask=stored, other=0.0)  # [BM, BD]
    slope = tl.zeros([BLOCK_M], tl.float32)
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + b * scoring.slopes_batch + head, mask=real, other=0.0)

    length = held(sequences, batch)
    first_position = length - shape.rows  # the last query stands where the last token does
    position = first_position + row
    begin = 0
    end = length
    if F.has_lower:
        begin = tl.maximum(begin, first_position + first_row // shape.group + scoring.lower) // BLOCK_N * BLOCK_N
    if F.has_upper:
        last_row = tl.minimum(first_row + BLOCK_M, packed_rows) - 1
        end = tl.minimum(end, first_position + last_row // shape.group + scoring.upper + 1)
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), shape.splits), BLOCK_N) * BLOCK_N
    begin = begin + split * part
    end = tl.minimum(begin + part, end)

    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first_column in tl.range(begin, end, BLOCK_N):
        column = first_column + tl.arange(0, BLOCK_N)
        inside = column < end
        keys = load_cache(key, sequences, batch, key_head, column, inside, F, DIM, BLOCK_D)  # [BN, BD]
        product = tl.dot(queries, tl.trans(keys), input_precision=F.precision)  # [BM, BN]
        score = decode_score(product, column, position, inside, slope, scoring, F)
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        # A row that has seen no key yet has maximum -inf: a finite pivot keeps exp(-inf - pivot) = 0 from being NaN.
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = exp(maximum - pivot)
        probability = exp(score - pivot[:, None])
        total = total * decay + tl.sum(probability, 1)
        values = load_cache(value, sequences, batch, key_head, column, inside, F, DIM, BLOCK_D)  # [BN, BD]
        output = output * decay[:, None]
        output = tl.dot(probability.to(values.dtype), values, output, input_precision=F.precision)
        maximum = new_maximum

    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), maximum + tl.log(safe_total))
    factor = 1.0 / safe_total
    if sinks is not None:
        lse, share = add_sink(lse, tl.load(sinks + head, mask=real, other=0.0).to(tl.float32))
        factor = factor * share
    output = output * factor[:, None]
    start = out.pointer + split.to(tl.int64) * out_split + b * out.batch
    start = start + head.to(tl.int64) * out.head + row.to(tl.int64) * out.row
    tl.store(start[:, None] + feature, output.to(out.pointer.dtype.element_ty), mask=stored)
    heads = shape.key_heads * shape.group
    place = ((split.to(tl.int64) * shape.batches + b) * heads + head) * shape.rows + row
    tl.store(logsumexp + place, lse, mask=real)


@triton.jit
def decode_combine(
    partial, partial_logsumexp, out, logsumexp, sinks, shape,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """partial (splits, B, H, L, D) and its logsumexp, both float32 -> out (B, H, L, D), logsumexp (B, H, L).

    One program puts one row together; BLOCK_S >= splits and STEP are powers of two.
    """
    heads = shape.key_heads * shape.group
    place = tl.program_id(0).to(tl.int64)
    row = place % shape.rows
    head = place // shape.rows % heads
    batch = place // shape.rows // heads
    all_rows = tl.cast(shape.batches, tl.int64) * heads * shape.rows
    split = tl.arange(0, BLOCK_S)
    lse = tl.load(partial_logsumexp + split * all_rows + place, mask=split < shape.splits, other=float("-inf"))
    maximum = tl.max(lse, 0)
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        maximum = tl.maximum(maximum, sink)
    pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(exp(lse - pivot), 0)
    if sinks is not None:
        total += exp(sink - pivot)
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)

    feature = tl.arange(0, BLOCK_D)
    output = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, shape.splits, STEP):
        part = first + tl.arange(0, STEP)
        inside = part < shape.splits
        part_lse = tl.load(partial_logsumexp + part * all_rows + place, mask=inside, other=float("-inf"))
        part_start = partial + (part * all_rows + place)[:, None] * DIM + feature[None, :]
        tile = tl.load(part_start, mask=inside[:, None] & (feature < DIM)[None, :], other=0.0)  # [STEP, BD]
        output += tl.sum(tile * exp(part_lse - pivot)[:, None], 0)
    address = out.pointer + batch * out.batch + head * out.head + row * out.row + feature
    tl.store(address, (output / safe_total).to(out.pointer.dtype.element_ty), mask=feature < DIM)
    tl.store(logsumexp + place, tl.where(empty, float("-inf"), pivot + tl.log(safe_total)))


@triton.jit
def append_tokens(
    new_key, new_value, key, value, sequences, key_heads,
    F: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write new_key (B, Hkv, T, D) and new_value (B, Hkv, T, Dv) behind what each sequence of the cache holds.

    Tokens without room and those whose page the table puts outside the pool are dropped.
    """
    tiles = tl.cdiv(sequences.appended, BLOCK_T)
    program = tl.program_id(0)
    batch = program // tiles // key_heads
    head = program // tiles % key_heads
    b = batch.to(tl.int64)
    h = head.to(tl.int64)
    token = program % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.load(sequences.lengths + batch).to(tl.int64) + token
    inside = (token < sequences.appended) & (column >= 0) & (column < sequences.capacity)
    column = column.to(tl.int32)
    feature = tl.arange(0, BLOCK_D)[None, :]
    row, kept = cache_rows(key, sequences, batch, head, column, inside, F)
    source = new_key.pointer + b * new_key.batch + h * new_key.head + token.to(tl.int64) * new_key.row
    mask = kept[:, None] & (feature < DIM)
    tl.store(row[:, None] + feature, tl.load(source[:, None] + feature, mask=mask), mask=mask)
    row, kept = cache_rows(value, sequences, batch, head, column, inside, F)
    source = new_value.pointer + b * new_value.batch + h * new_value.head + token.to(tl.int64) * new_value.row
    mask = kept[:, None] & (feature < VALUE_DIM)
    tl.store(row[:, None] + feature, tl.load(source[:, None] + feature, mask=mask), mask=mask)
